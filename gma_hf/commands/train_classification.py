# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a text classifier, from scratch or from a checkpoint (a causal one, too).

    gma-hf train-classification scripts/configs/train_classification.yaml \
        --train_file train.jsonl --validation_file valid.jsonl --output_dir runs/classifier

Pass arguments on the command line, or in a JSON or YAML file before them. `--help` and `--help-all` list the arguments.
"""

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from ..training.arguments import ClassificationArguments
from ..training.metrics import classification_metrics, expect_scikit_learn, predicted_classes
from ..training.text.data import load_labelled_splits, tokenize_texts
from ..training.trainer import GMATrainer
from .shared.training import Job, build_model, check_length, limit, prepare_tokenizer, run_training, train_and_report


def main(argv: list[str] | None = None) -> None:
    options = ("text_column", "label_column", "max_length")
    run_training("train-classification", ClassificationArguments, argv, __doc__, options, train)


def train(job: Job) -> None:
    """Load the data, make tokenizer and model, train, and report."""
    model_args, data_args, args = job.model_args, job.data_args, job.args
    expect_scikit_learn()
    with args.main_process_first(desc="loading the data"):
        splits, names = load_labelled_splits(data_args, args.seed, model_args.trust_remote_code)
    tokenizer = prepare_tokenizer(job, splits["train"])
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
                # Files are often sorted by class, so a part is chosen at random
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
        data = {
            "text_column": data_args.text_column,
            "label_column": data_args.label_column,
            "classes": names,
            **{f"{split}_texts": len(dataset) for split, dataset in tokenized.items()},
        }
        task, auto_class = "text-classification", "AutoModelForSequenceClassification"
        details = {"max_length": data_args.max_length}
        return job.record(trainer, details, data, task=task, auto_class=auto_class, metrics=metrics)

    train_and_report(trainer, job, tokenized.get("test"), lambda metrics, split: metrics, record)
