# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Which files of a folder belong to a published model, and their checks.

Only files that this module knows by name are published. Optimizer states, checkpoints, logs and files of other programs are
not published, and the command lists them.
"""

import json
import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ...training.errors import TrainingInputError


# The files of a published model
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PUBLISHED = (
    *WEIGHTS,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # SentencePiece
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "results.json",
    "LICENSE",
)
CARD_FILES = ("README.md", "recipe.yaml", "results.json", "LICENSE", "*.png", "*.svg")
# The files that are not published, and their descriptions
LEFT_BEHIND = {
    "checkpoint-*": "a checkpoint of the training",
    "optimizer*": "an optimizer state",
    "scheduler.pt": "a state of the training",
    "scaler.pt": "a state of the training",
    "rng_state*": "a state of the training",
    "trainer_state.json": "a state of the training",
    "training_args.bin": "a pickle, which runs code when it is read",
    "*.bin": "a pickle, which runs code when it is read",
    "*.pt": "a pickle, which runs code when it is read",
    "*.pth": "a pickle, which runs code when it is read",
    "*.pkl": "a pickle, which runs code when it is read",
    "events.out.*": "a log",
    "runs": "logs",
}
# Files of an unfinished training: their folder is not a finished model
CHECKPOINT_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "pytorch_model_fsdp_0")
GB = 10**9
# The hub takes larger files, but advises against them; weights can be written in shards
MAX_FILE_BYTES = 50 * GB
# Texts for other people must not contain local folders
READ_BY_PEOPLE = ("*.md", "*.yaml", "results.json", "*config.json")


def check_source(source: Path) -> None:
    if not source.is_dir():
        raise TrainingInputError(f"There is no folder {source}. Give the folder that save_pretrained wrote.")
    if not (source / "config.json").is_file():
        raise TrainingInputError(f"{source} has no config.json. Give the folder that save_pretrained wrote.")
    states = [name for name in CHECKPOINT_FILES if (source / name).exists()]
    if states:
        raise TrainingInputError(
            f"{source} is a checkpoint of a training that may go on (it has {states[0]}), not a finished model. Give the "
            "output folder of the training, or load the checkpoint and save it elsewhere with save_pretrained."
        )
    if not any(source.glob("*.safetensors")):
        raise TrainingInputError(
            f"{source} has no weights in safetensors. Load the model and save it with save_pretrained, which writes safetensors."
        )
    _check_shards(source)


def _check_shards(source: Path) -> None:
    for index in source.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in shards if not (source / name).is_file())
        if missing:
            raise TrainingInputError(f"{index.name} names {missing[0]}, which is not in {source}.")


def choose(folder: Path, patterns: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of a folder that match, and the other files with the reason why they are not published."""
    chosen, left_behind = {}, {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            if not path.resolve().is_relative_to(folder):
                raise TrainingInputError(
                    f"{path} is a link to {path.resolve()}, outside of the folder. Copy the file into the folder if it is to "
                    "be published."
                )
            chosen[path.name] = path
        else:
            reasons = (reason for pattern, reason in LEFT_BEHIND.items() if fnmatch(path.name, pattern))
            left_behind[path.name] = next(reasons, "a folder" if path.is_dir() else "not part of a published model")
    return chosen, left_behind


def check_sizes(files: dict[str, Path], max_total_gb: float) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    for name, size in sizes.items():
        if size > MAX_FILE_BYTES:
            raise TrainingInputError(
                f"{name} has {size / GB:.1f} GB, more than the {MAX_FILE_BYTES / GB:g} GB of a file on the hub. Save the model "
                "again with max_shard_size='5GB'."
            )
    if sum(sizes.values()) > max_total_gb * GB:
        raise TrainingInputError(
            f"The files have {sum(sizes.values()) / GB:.2f} GB, more than --max_total_gb {max_total_gb:g}. Raise it if that is "
            "meant."
        )


def check_names_no_code(chosen: dict[str, Path]) -> None:
    """Refuse configurations that make others run code that is not published, above all code of another repository."""
    for name, path in chosen.items():
        if not fnmatch(name, "*config.json"):
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainingInputError(f"{path} is no JSON: {error}.") from error
        if name == "config.json" and isinstance(values, dict):
            # Written anew, see `assembly._write_remote_code`
            values.pop("auto_map", None)
        code = _named_code(values)
        if code is not None:
            raise TrainingInputError(
                f"{name} names code of its own ({code}), which is not published. Take the entry out; save a tokenizer or processor "
                "with a class of Transformers."
            )


def _named_code(values: Any) -> str | None:
    """The first entry of a configuration, at any depth, that lets Transformers run code from a repository."""
    if isinstance(values, list):
        return next((code for code in map(_named_code, values) if code is not None), None)
    if not isinstance(values, dict):
        return None
    for key, value in values.items():
        is_code = key in ("auto_map", "custom_pipelines") and value
        # The name of a repository with compiled kernels
        is_code = is_code or (key.strip("_").startswith("attn_implementation") and "/" in json.dumps(value))
        if is_code:
            return f"{key}: {value}"
        inner = _named_code(value)
        if inner is not None:
            return inner
    return None


def check_no_folders(folder: Path, source: Path) -> None:
    names = {str(source), str(source.parent), str(Path.home()), tempfile.gettempdir()} - {os.sep}
    for path in sorted(folder.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in READ_BY_PEOPLE):
            continue
        text = path.read_text(encoding="utf-8")
        for name in sorted(names):
            if f"{name}{os.sep}" in text or f'"{name}"' in text:
                raise TrainingInputError(
                    f"{path.name} names {name}, a folder of this machine. Others cannot use it: edit the text."
                )
