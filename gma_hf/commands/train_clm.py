# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a causal language model, from scratch or from a checkpoint.

    gma-hf train-clm scripts/configs/train_clm.yaml --train_file corpus.txt --output_dir runs/clm
    accelerate launch scripts/train_clm.py scripts/configs/train_clm.yaml --train_file corpus.txt --output_dir runs/clm

Pass arguments on the command line, or in a JSON or YAML file before them. `--help` and `--help-all` list the arguments.
"""

from transformers import AutoModelForCausalLM

from ..training.arguments import CausalLanguageModelingArguments
from ..training.metrics import language_model_metrics, text_metrics, token_statistics
from ..training.text.data import load_text_splits
from ..training.text.packing import PackedCollator, pack_splits
from ..training.text.streaming import SHUFFLED_BLOCKS, TOKENIZER_ROWS, stream_blocks, stream_text_splits
from ..training.trainer import GMATrainer
from .shared.training import Job, build_model, check_length, limit, prepare_tokenizer, run_training, train_and_report


def main(argv: list[str] | None = None) -> None:
    options = ("block_size", "isolate_documents", "streaming")
    run_training("train-clm", CausalLanguageModelingArguments, argv, __doc__, options, train)


def train(job: Job) -> None:
    """Load the data, make tokenizer and model, train, and report."""
    model_args, data_args, args = job.model_args, job.data_args, job.args
    if data_args.streaming:
        splits = stream_text_splits(data_args, args.max_steps)
        to_learn_from = splits["train"].take(TOKENIZER_ROWS)
    else:
        with args.main_process_first(desc="loading the data"):
            splits = load_text_splits(data_args, args.seed, model_args.trust_remote_code)
        to_learn_from = splits["train"]
    tokenizer = prepare_tokenizer(job, to_learn_from)
    model = build_model(AutoModelForCausalLM, model_args, tokenizer)
    check_length(model, data_args.block_size, "--block_size")
    stream = splits.pop("train") if data_args.streaming else None
    with args.main_process_first(desc="packing the data"):
        packed = pack_splits(splits, tokenizer, data_args)
    if stream is not None:
        # A buffer separates neighbouring blocks of the text in the training
        train_blocks = stream_blocks(stream, tokenizer, data_args).shuffle(args.seed, buffer_size=SHUFFLED_BLOCKS)
    else:
        train_blocks = limit(packed["train"].blocks, data_args.max_train_samples)
    eval_blocks = {
        split: limit(packed[split].blocks, data_args.max_eval_samples) for split in packed if split != "train"
    }

    trainer = GMATrainer(
        model=model,
        args=args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks["validation"],
        processing_class=tokenizer,
        data_collator=PackedCollator(tokenizer.pad_token_id),
        compute_metrics=language_model_metrics,
        preprocess_logits_for_metrics=token_statistics(shift_labels=True),
    )

    def finish_metrics(metrics, split):
        text = packed["validation" if split == "eval" else split]
        if data_args.max_eval_samples is not None and data_args.max_eval_samples < len(text.blocks):
            return metrics  # not all of the text was read, so its size is unknown
        scores = text_metrics(metrics[f"{split}_loss"], metrics[f"{split}_num_tokens"], text)
        return {**metrics, **{f"{split}_{name}": value for name, value in scores.items()}}

    def size_of_training_data():
        if stream is not None:
            blocks = (
                trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            )
            return {"train_tokens": blocks * data_args.block_size}
        return {
            "train_documents": packed["train"].num_documents,
            "train_tokens": len(train_blocks) * data_args.block_size,
        }

    def record(metrics):
        details = {"block_size": data_args.block_size, "isolate_documents": data_args.isolate_documents}
        task, auto_class = "text-generation", "AutoModelForCausalLM"
        size = size_of_training_data()
        return job.record(trainer, details, size, task=task, auto_class=auto_class, metrics=metrics)

    train_and_report(trainer, job, eval_blocks.get("test"), finish_metrics, record)
