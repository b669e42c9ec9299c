# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The result of a training (model, data, training, scores) as a model card for people, and as `results.json` for programs.
"""

import math
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import PreTrainedModel, TrainingArguments

from ... import __version__
from ..files import write_json
from .frame import (
    TAGS,
    bullets,
    describe_command,
    device_name,
    is_gma,
    loading_example,
    make_card,
    name_of_data,
    table,
    versions,
)


HYPERPARAMETERS = (
    "learning_rate",
    "mixture_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
    "bf16",
    "fp16",
    "torch_compile",
    "gradient_checkpointing",
)
# Names of our metrics (without the split) on the hub, and how the card writes them
METRICS = {
    "loss": ("loss", "loss"),
    "perplexity": ("perplexity", "perplexity"),
    "accuracy": ("accuracy", "accuracy"),
    "f1_macro": ("f1", "F1 (macro)"),
    "f1_binary": ("f1", "F1 (class 1)"),
    "bits_per_byte": ("bits_per_byte", "bits per byte"),
    "word_perplexity": ("word_perplexity", "perplexity per word"),
}
# How a card names the splits of `evaluate`
SPLITS = {"eval": "validation", "test": "test"}


@dataclass
class TrainingRecord:
    """
    One training run, for the card and for `results.json`.

    Args:
        task (`str`): `text-generation`, `fill-mask` or `text-classification` (the pipeline tags of the Hub).
        auto_class (`str`): Auto class that loads the model.
        data (`dict`): the result of `describe_data`, and counts.
        details (`dict`): further facts about the training (block length, ...).
        metrics (`dict[str, float]`): scores with the name of their split: `eval_perplexity`, `test_accuracy`, ...
        base_model (`str`, *optional*): the checkpoint that was continued.
        command (`str`, *optional*): by default the command line of this process.
        date (`str`, *optional*): by default the current time.
    """

    task: str
    auto_class: str
    data: dict[str, Any]
    details: dict[str, Any]
    metrics: dict[str, float]
    base_model: str | None = None
    command: str = field(default_factory=lambda: describe_command(sys.argv))
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


def write_results(output_dir: str, args: TrainingArguments, model: PreTrainedModel, record: TrainingRecord) -> None:
    """Write `results.json`: every metric, and everything that is needed to measure it again."""
    results = {
        "task": record.task,
        "date": record.date,
        "command": record.command,
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters(),
        "base_model": record.base_model,
        "data": record.data,
        "details": record.details,
        "hyperparameters": hyperparameters(args),
        # JSON knows no infinity
        "metrics": {name: value if math.isfinite(value) else None for name, value in record.metrics.items()},
        "device": device_name(args),
        "num_processes": args.world_size,
        "versions": versions(),
    }
    write_json(Path(output_dir) / "results.json", results)


def write_model_card(output_dir: str, args: TrainingArguments, model: PreTrainedModel, record: TrainingRecord) -> None:
    """Write `README.md`, a model card with valid metadata."""
    name = Path(output_dir).resolve().name
    data_name = name_of_data(record.data)
    is_hub_dataset = "dataset" in record.data and not Path(data_name).exists()
    shown = [(key, *_split_metric(key)) for key in record.metrics if _split_metric(key) is not None]
    results = [
        EvalResult(
            task_type=record.task,
            dataset_type=data_name if is_hub_dataset else "local",
            dataset_name=data_name if is_hub_dataset else _evaluated_files(record.data, split),
            dataset_split=SPLITS[split],
            metric_type=METRICS[metric][0],
            metric_name=METRICS[metric][1],
            metric_value=record.metrics[key],
        )
        for key, split, metric in shown
        if math.isfinite(record.metrics[key])
    ]
    scores = [[METRICS[metric][1], SPLITS[split], f"{record.metrics[key]:.4g}"] for key, split, metric in shown]
    start = f"continued from `{record.base_model}`" if record.base_model else "trained from scratch"
    processes = f"{args.world_size} process{'es' if args.world_size > 1 else ''}"
    sections = [
        (
            None,
            f"A `{model.config.model_type}` model for {record.task} with {model.num_parameters():,} parameters, {start} "
            f"with gma_hf {__version__} on {record.date[:10]}.",
        ),
        ("Scores", table(["metric", "data", "value"], scores, left=3)),
        ("How to load it", loading_example(name, record.auto_class, is_gma(model.config))),
        ("Training data", bullets(record.data)),
        (
            "Training",
            bullets({**record.details, **hyperparameters(args)}),
            f"On {device_name(args)}, {processes}:",
            f"```bash\n{record.command}\n```",
        ),
        ("Versions", bullets(versions())),
    ]
    card = make_card(
        name,
        sections,
        model_name=name,
        pipeline_tag=record.task,
        tags=TAGS if is_gma(model.config) else None,
        datasets=[data_name] if is_hub_dataset else None,
        base_model=record.base_model,
        eval_results=results or None,
    )
    card.save(Path(output_dir) / "README.md")


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The facts about the optimization for the model card. Arguments that are not set are left out."""
    values = {name: getattr(args, name, None) for name in HYPERPARAMETERS}
    if values["max_steps"] is not None and values["max_steps"] > 0:
        values.pop("num_train_epochs")
    else:
        values.pop("max_steps")
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _split_metric(key: str) -> tuple[str, str] | None:
    split, _, metric = key.partition("_")
    return (split, metric) if split in SPLITS and metric in METRICS else None


def _evaluated_files(data: dict[str, Any], split: str) -> str:
    files = data.get("test_files" if split == "test" else "validation_files")
    return ", ".join(files) if files else f"held-out part of {', '.join(data.get('train_files', ['the data']))}"
