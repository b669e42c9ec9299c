# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a bidirectional encoder by masked language modelling, from scratch or from a checkpoint.

    gma-hf train-mlm scripts/configs/train_mlm.yaml --train_file corpus.txt --output_dir runs/mlm

Pass arguments on the command line, or in a JSON or YAML file before them. `--help` and `--help-all` list the arguments.
"""

from transformers import AutoModelForMaskedLM

from ..training.arguments import MaskedLanguageModelingArguments
from ..training.metrics import language_model_metrics, token_statistics
from ..training.text.data import load_text_splits
from ..training.text.masking import MaskingCollator, mask_dataset
from ..training.text.packing import pack_documents
from ..training.text.tokenization import separator_id
from ..training.trainer import GMATrainer
from .shared.training import Job, build_model, check_length, limit, prepare_tokenizer, run_training, train_and_report


def main(argv: list[str] | None = None) -> None:
    run_training("train-mlm", MaskedLanguageModelingArguments, argv, __doc__, ("block_size", "mlm_probability"), train)


def train(job: Job) -> None:
    """Load the data, make tokenizer and model, train, and report."""
    model_args, data_args, args = job.model_args, job.data_args, job.args
    with args.main_process_first(desc="loading the data"):
        splits = load_text_splits(data_args, args.seed, model_args.trust_remote_code)
    tokenizer = prepare_tokenizer(job, splits["train"], with_mask=True)
    model = build_model(AutoModelForMaskedLM, model_args, tokenizer, is_causal=False)
    check_length(model, data_args.block_size, "--block_size")
    with args.main_process_first(desc="packing the data"):
        packed = {
            split: pack_documents(
                dataset,
                tokenizer,
                separator_id(tokenizer),
                data_args.block_size,
                split,
                isolate_documents=data_args.isolate_documents,
                keep_last=split != "train",
                num_proc=data_args.preprocessing_num_workers,
            )
            for split, dataset in splits.items()
        }
    train_blocks = limit(packed["train"].blocks, data_args.max_train_samples)
    eval_blocks = {
        split: mask_dataset(
            limit(packed[split].blocks, data_args.max_eval_samples), tokenizer, data_args.mlm_probability, args.seed
        )
        for split in packed
        if split != "train"
    }

    trainer = GMATrainer(
        model=model,
        args=args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks["validation"],
        processing_class=tokenizer,
        data_collator=MaskingCollator(tokenizer, data_args.mlm_probability),
        compute_metrics=language_model_metrics,
        preprocess_logits_for_metrics=token_statistics(shift_labels=False),
    )

    def record(metrics):
        size = {
            "train_documents": packed["train"].num_documents,
            "train_tokens": len(train_blocks) * data_args.block_size,
        }
        names = ("block_size", "isolate_documents", "mlm_probability")
        details = {name: getattr(data_args, name) for name in names}
        return job.record(trainer, details, size, task="fill-mask", auto_class="AutoModelForMaskedLM", metrics=metrics)

    train_and_report(trainer, job, eval_blocks.get("test"), lambda metrics, split: metrics, record)
