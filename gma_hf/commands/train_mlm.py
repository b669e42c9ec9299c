# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a bidirectional encoder by masked language modelling, from scratch or from a checkpoint.

    gma-hf train-mlm scripts/configs/train_mlm.yaml --train_file corpus.txt --output_dir runs/mlm

Arguments come from the command line, or from a JSON or YAML file that stands first; `--help` and `--help-all` list them.
"""

from transformers import AutoModelForMaskedLM

from ..training.arguments import MaskedLanguageModelingArguments, ModelArguments, parse_arguments
from ..training.cards.model_card import TrainingRecord, describe_data, without_folder
from ..training.metrics import language_model_metrics, token_statistics
from ..training.run_folder import RunFolder
from ..training.text.data import load_text_splits
from ..training.text.masking import MaskingCollator, mask_dataset
from ..training.text.packing import pack_documents
from ..training.text.tokenization import separator_id
from ..training.trainer import GMATrainer, GMATrainingArguments
from ..training.workflow import (
    build_model,
    check_length,
    limit,
    prepare_tokenizer,
    start,
    train_and_report,
)


# What `--help` shows
COMMON = (
    "train_file",
    "validation_file",
    "test_file",
    "dataset_name",
    "dataset_config_name",
    "output_dir",
    "model_name_or_path",
    "preset",
    "config_overrides",
    "tokenizer_vocab_size",
    "block_size",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "torch_compile",
    "overwrite_output_dir",
    "mlm_probability",
)


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(
        [ModelArguments, MaskedLanguageModelingArguments, GMATrainingArguments],
        argv,
        command="gma-hf train-mlm",
        description=__doc__.splitlines()[0],
        common=COMMON,
    )
    run, checkpoint = start("train-mlm", model_args, data_args, args)
    if not run.is_finished:
        with run:
            train(model_args, data_args, args, run, checkpoint)


def train(
    model_args: ModelArguments,
    data_args: MaskedLanguageModelingArguments,
    args: GMATrainingArguments,
    run: RunFolder,
    checkpoint: str | None,
) -> None:
    """Load the data, make tokenizer and model, train, and report."""

    with args.main_process_first(desc="loading the data"):
        splits = load_text_splits(data_args, args.seed, model_args.trust_remote_code)
    tokenizer = prepare_tokenizer(model_args, args, splits["train"], run, checkpoint, with_mask=True)
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
        return TrainingRecord(
            task="fill-mask",
            auto_class="AutoModelForMaskedLM",
            data={
                **describe_data(data_args),
                "train_documents": packed["train"].num_documents,
                "train_tokens": len(train_blocks) * data_args.block_size,
            },
            details={
                "steps": trainer.state.global_step,
                "block_size": data_args.block_size,
                "isolate_documents": data_args.isolate_documents,
                "mlm_probability": data_args.mlm_probability,
                "preset": None if model_args.model_name_or_path or model_args.config_name else model_args.preset,
            },
            metrics=metrics,
            base_model=model_args.model_name_or_path and without_folder(model_args.model_name_or_path),
        )

    train_and_report(trainer, run, checkpoint, eval_blocks.get("test"), lambda metrics, split: metrics, record)
