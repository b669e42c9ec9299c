# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a text classifier, from scratch or from a checkpoint (a causal one, too).

    gma-hf train-classification scripts/configs/train_classification.yaml \
        --train_file train.jsonl --validation_file valid.jsonl --output_dir runs/classifier

Arguments come from the command line, or from a JSON or YAML file that stands first; `--help` and `--help-all` list them.
"""

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from ..training.arguments import ClassificationArguments, ModelArguments, parse_arguments
from ..training.cards.model_card import TrainingRecord, describe_data, without_folder
from ..training.metrics import classification_metrics, predicted_classes
from ..training.run_folder import RunFolder
from ..training.text.data import load_labelled_splits, tokenize_texts
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
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "torch_compile",
    "overwrite_output_dir",
    "text_column",
    "label_column",
    "max_length",
)


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(
        [ModelArguments, ClassificationArguments, GMATrainingArguments],
        argv,
        command="gma-hf train-classification",
        description=__doc__.splitlines()[0],
        common=COMMON,
    )
    run, checkpoint = start("train-classification", model_args, data_args, args)
    if not run.is_finished:
        with run:
            train(model_args, data_args, args, run, checkpoint)


def train(
    model_args: ModelArguments,
    data_args: ClassificationArguments,
    args: GMATrainingArguments,
    run: RunFolder,
    checkpoint: str | None,
) -> None:
    """Load the data, make tokenizer and model, train, and report."""

    with args.main_process_first(desc="loading the data"):
        splits, names = load_labelled_splits(data_args, args.seed, model_args.trust_remote_code)
    tokenizer = prepare_tokenizer(model_args, args, splits["train"], run, checkpoint)
    model = build_model(
        AutoModelForSequenceClassification,
        model_args,
        tokenizer,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    check_length(model, data_args.max_length, "--max_length")
    limits = {"train": data_args.max_train_samples}
    with args.main_process_first(desc="tokenizing the data"):
        tokenized = {
            split: tokenize_texts(
                # Files are often sorted by class: a part is taken at random
                limit(dataset, limits.get(split, data_args.max_eval_samples), shuffle_seed=args.seed),
                tokenizer,
                data_args.max_length,
                split,
                data_args.preprocessing_num_workers,
            )
            for split, dataset in splits.items()
        }

    trainer = GMATrainer(
        model=model,
        args=args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        compute_metrics=classification_metrics,
        preprocess_logits_for_metrics=predicted_classes,
    )

    def record(metrics):
        return TrainingRecord(
            task="text-classification",
            auto_class="AutoModelForSequenceClassification",
            data={
                **describe_data(data_args),
                "text_column": data_args.text_column,
                "label_column": data_args.label_column,
                "classes": names,
                **{f"{split}_texts": len(dataset) for split, dataset in tokenized.items()},
            },
            details={
                "steps": trainer.state.global_step,
                "max_length": data_args.max_length,
                "preset": None if model_args.model_name_or_path or model_args.config_name else model_args.preset,
            },
            metrics=metrics,
            base_model=model_args.model_name_or_path and without_folder(model_args.model_name_or_path),
        )

    train_and_report(trainer, run, checkpoint, tokenized.get("test"), lambda metrics, split: metrics, record)
