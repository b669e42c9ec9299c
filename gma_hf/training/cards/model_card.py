# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What was trained, on what, how, and what it scored: a model card for people and `results.json` for programs."""

import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ... import __version__
from ..arguments import DataArguments
from ..files import write_json


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


@dataclass
class TrainingRecord:
    """One training run, as the card and `results.json` tell it.

    Attributes:
        task: `text-generation`, `fill-mask` or `text-classification` (the hub's pipeline tags).
        auto_class: Auto class that loads the model.
        data: what `describe_data` returns, and counts that are worth telling.
        details: further facts about the training (block length, ...).
        metrics: scores with their split in front: `eval_perplexity`, `test_accuracy`, ...
        base_model: checkpoint that was continued, if any.
    """

    task: str
    auto_class: str
    data: dict[str, Any]
    details: dict[str, Any]
    metrics: dict[str, float]
    base_model: str | None = None
    command: str = field(default_factory=lambda: describe_command(sys.argv))
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


def describe_data(arguments: DataArguments) -> dict[str, Any]:
    """Name the data: a data set of the hub, or files without their folders."""
    if arguments.dataset_name is not None:
        return {"dataset": without_folder(arguments.dataset_name), "config": arguments.dataset_config_name}
    return {
        f"{split}_files": [without_folder(name) for name in files]
        for split in ("train", "validation", "test")
        if (files := getattr(arguments, f"{split}_file")) is not None
    }


def describe_command(argv: list[str]) -> str:
    """Write the command as it was given, but for the folders of this machine."""
    program = Path(argv[0]).name
    is_script = program.endswith(".py") and program != "__main__.py"
    words = ["python", f"scripts/{program}"] if is_script else ["gma-hf"]
    for word in argv[1:]:
        name, equals, value = word.partition("=")
        words.append(f"{name}={without_folder(value)}" if equals and name.startswith("--") else without_folder(word))
    return shlex.join(words)


def without_folder(name: str) -> str:
    """Drop the folders of a local path; hub names and other words stay as they are."""
    path = Path(name).expanduser()
    is_local = path.is_absolute() or name.startswith(("./", "../", "~")) or (os.sep in name and path.exists())
    return path.name if is_local else name


def write_results(output_dir: str, args: TrainingArguments, model: PreTrainedModel, record: TrainingRecord) -> None:
    """Write `results.json`: every metric, and what is needed to get them again."""
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
    data_name = str(record.data.get("dataset") or ", ".join(record.data.get("train_files", ["local files"])))
    is_hub_dataset = "dataset" in record.data and not Path(data_name).exists()
    shown = [(key, *_split_metric(key)) for key in record.metrics if _split_metric(key) is not None]
    metadata = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=record.task,
        tags=["gma", "gaussian-mixture-attention"] if is_gma(model.config) else None,
        datasets=[data_name] if is_hub_dataset else None,
        base_model=record.base_model,
        eval_results=[
            EvalResult(
                task_type=record.task,
                dataset_type=data_name if is_hub_dataset else "local",
                dataset_name=data_name if is_hub_dataset else _evaluated_files(record.data, split),
                dataset_split="test" if split == "test" else "validation",
                metric_type=METRICS[metric][0],
                metric_name=METRICS[metric][1],
                metric_value=record.metrics[key],
            )
            for key, split, metric in shown
            if math.isfinite(record.metrics[key])
        ]
        or None,
    )
    scores = [
        f"| {METRICS[metric][1]} | {'test' if split == 'test' else 'validation'} | {record.metrics[key]:.4g} |"
        for key, split, metric in shown
    ]
    start = f"continued from `{record.base_model}`" if record.base_model else "trained from scratch"
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        f"A `{model.config.model_type}` model for {record.task} with {model.num_parameters():,} parameters, {start} with "
        f"gma_hf {__version__} on {record.date[:10]}.",
        "## Scores",
        "\n".join(["| metric | data | value |", "|---|---|---|", *scores]),
        "## How to load it",
        _loading_example(name, model, record),
        "## Training data",
        bullets(record.data),
        "## Training",
        bullets({**record.details, **hyperparameters(args)}),
        f"On {device_name(args)}, {args.world_size} process{'es' if args.world_size > 1 else ''}:",
        f"```bash\n{record.command}\n```",
        "## Versions",
        bullets(versions()),
    ]
    ModelCard("\n\n".join(sections) + "\n").save(Path(output_dir) / "README.md")


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """Return what the model card tells about the optimization; arguments that are unset are left out."""
    values = {name: getattr(args, name, None) for name in HYPERPARAMETERS}
    if values["max_steps"] is not None and values["max_steps"] > 0:
        values.pop("num_train_epochs")
    else:
        values.pop("max_steps")
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def device_name(args: TrainingArguments) -> str:
    """Return the accelerator's name, or `CPU`."""
    if args.device.type == "cuda":
        return torch.cuda.get_device_name(args.device)
    return args.device.type.upper()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape the result."""
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {
        "gma_hf": __version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def _split_metric(key: str) -> tuple[str, str] | None:
    split, _, metric = key.partition("_")
    return (split, metric) if split in ("eval", "test") and metric in METRICS else None


def _evaluated_files(data: dict[str, Any], split: str) -> str:
    files = data.get("test_files" if split == "test" else "validation_files")
    return ", ".join(files) if files else f"held-out part of {', '.join(data.get('train_files', ['the data']))}"


def bullets(values: dict[str, Any]) -> str:
    lines = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = ", ".join(map(str, value[:10])) + (f" and {len(value) - 10} more" if len(value) > 10 else "")
        lines.append(
            f"- {name.replace('_', ' ')}: {value:,}" if type(value) is int else f"- {name.replace('_', ' ')}: {value}"
        )
    return "\n".join(lines)


def is_gma(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a GMA model, native or converted."""
    return config.model_type == "gma" or config.model_type.startswith("gma_")


def _loading_example(name: str, model: PreTrainedModel, record: TrainingRecord) -> str:
    lines = ["import gma_hf  # registers the architecture"] if is_gma(model.config) else []
    lines += [
        f"from transformers import {record.auto_class}, AutoTokenizer",
        "",
        f'model = {record.auto_class}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"
