# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The frame of every model card, and the facts that every card gives: command, data, device, versions.

`model_card` fills the frame after a training, `conversion_card` after a conversion, `published_card` for the Hub.
"""

import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, TrainingArguments

from ... import __version__
from ..arguments import DataArguments


TAGS = ["gma", "gaussian-mixture-attention"]


def make_card(title: str, sections: Iterable[tuple[str | None, ...]], **metadata: Any) -> ModelCard:
    """
    Build a card from its sections.

    Args:
        title (`str`): headline of the card.
        sections (`Iterable[tuple]`): each section has a heading (or `None`) and paragraphs. Empty paragraphs are left out,
            and a heading without paragraphs, too.
        metadata (`Any`): fields of `ModelCardData` for the Hub.

    Returns:
        `ModelCard`: the card.
    """
    fields = ModelCardData(library_name="transformers", **metadata)
    parts = [f"---\n{fields.to_yaml()}\n---", f"# {title}"]
    for heading, *paragraphs in sections:
        paragraphs = [paragraph for paragraph in paragraphs if paragraph]
        if paragraphs and heading is not None:
            parts.append(f"## {heading}")
        parts += paragraphs
    return ModelCard("\n\n".join(parts) + "\n")


def loading_example(name: str, auto_class: str, with_gma: bool = True) -> str:
    """The lines that load a model and its tokenizer."""
    lines = ["import gma_hf  # registers the architecture"] if with_gma else []
    lines += [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def bullets(values: dict[str, Any]) -> str:
    """A list of names and values. Local folders and values that are `None` are left out."""
    lines = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            shown = ", ".join(without_folder(str(entry)) for entry in value[:10])
            shown += f" and {len(value) - 10} more" if len(value) > 10 else ""
        else:
            shown = f"{value:,}" if type(value) is int else without_folder(str(value))
        lines.append(f"- {name.replace('_', ' ')}: {shown}")
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table in Markdown. The first `left` columns are left-aligned, the others right-aligned."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def is_gma(config: PreTrainedConfig) -> bool:
    """Whether a configuration belongs to a GMA model, native or converted."""
    return config.model_type == "gma" or config.model_type.startswith("gma_")


def describe_data(arguments: DataArguments) -> dict[str, Any]:
    """The name of the data: a data set of the Hub, or files without their folders."""
    if arguments.dataset_name is not None:
        return {"dataset": without_folder(arguments.dataset_name), "config": arguments.dataset_config_name}
    return {
        f"{split}_files": [without_folder(name) for name in files]
        for split in ("train", "validation", "test")
        if (files := getattr(arguments, f"{split}_file")) is not None
    }


def name_of_data(data: dict[str, Any]) -> str:
    """One name for the result of `describe_data`."""
    return str(data.get("dataset") or ", ".join(data.get("train_files", ["local files"])))


def describe_command(argv: list[str]) -> str:
    """The command as it was typed, without local folders."""
    program = Path(argv[0]).name
    is_script = program.endswith(".py") and program != "__main__.py"
    words = ["python", f"scripts/{program}"] if is_script else ["gma-hf"]
    for word in argv[1:]:
        name, equals, value = word.partition("=")
        words.append(f"{name}={without_folder(value)}" if equals and name.startswith("--") else without_folder(word))
    return shlex.join(words)


def without_folder(name: str) -> str:
    """A local path without its folders. Hub names and other words stay."""
    path = Path(name).expanduser()
    is_local = path.is_absolute() or name.startswith(("./", "../", "~")) or (os.sep in name and path.exists())
    return path.name if is_local else name


def device_name(args: TrainingArguments) -> str:
    """The name of the accelerator, or `CPU`."""
    if args.device.type == "cuda":
        return torch.cuda.get_device_name(args.device)
    return args.device.type.upper()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect the result."""
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {
        "gma_hf": __version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }
