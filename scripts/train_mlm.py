#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a bidirectional encoder by masked language modelling, from scratch or from a checkpoint.

    python scripts/train_mlm.py scripts/configs/train_mlm.yaml --train_file corpus.txt --output_dir runs/mlm

Arguments come from the command line, or from a JSON or YAML file that stands first; `--help` lists them.
"""

from transformers import AutoModelForMaskedLM

from gma_hf.training.arguments import MaskedLanguageModelingArguments, ModelArguments, parse_arguments
from gma_hf.training.cards.model_card import TrainingRecord, describe_data, without_folder
from gma_hf.training.metrics import language_model_metrics, token_statistics
from gma_hf.training.text.data import load_text_splits
from gma_hf.training.text.masking import MaskingCollator, mask_dataset
from gma_hf.training.text.packing import pack_documents
from gma_hf.training.text.tokenization import separator_id
from gma_hf.training.trainer import GMATrainer, GMATrainingArguments
from gma_hf.training.workflow import (
    build_model,
    check_length,
    limit,
    prepare_tokenizer,
    run_script,
    start,
    train_and_report,
)


def main():
    model_args, data_args, args = parse_arguments(
        [ModelArguments, MaskedLanguageModelingArguments, GMATrainingArguments]
    )
    checkpoint = start(args)

    with args.main_process_first(desc="loading the data"):
        splits = load_text_splits(data_args, args.seed, model_args.trust_remote_code)
    tokenizer = prepare_tokenizer(model_args, args, splits["train"], checkpoint, with_mask=True)
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

    train_and_report(trainer, checkpoint, eval_blocks.get("test"), lambda metrics, split: metrics, record)


if __name__ == "__main__":
    run_script(main)
