# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The identity of a run: its command, its options, and the content of the files that it reads."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


# A file up to this size is read as a whole; of a larger one some parts
WHOLE_FILE_BYTES = 2**30
NUM_PARTS, PART_BYTES = 64, 2**20
# The files of a model's folder that decide what the model computes
MODEL_FILES = ("config.json", "*.safetensors", "tokenizer.json", "adapter_config.json")
# Options that change where a run writes, how it reports and how fast it is, but not what it learns
WITHOUT_EFFECT = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_dir",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "report_to",
    "run_name",
    "project",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "preprocessing_num_workers",
    "include_num_input_tokens_seen",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "use_cpu",
    "device",
    "local_rank",
    "deepspeed_plugin",
    # Files and folders are compared by their content
    "train_file",
    "validation_file",
    "test_file",
    "model_name_or_path",
    "text",
    "model",
}


def fingerprint(command: str, arguments: Iterable[Any], paths: dict[str, Any], **further: Any) -> dict[str, Any]:
    """
    Describe a run, for a comparison with another run.

    Args:
        command (`str`): name of the command.
        arguments (`Iterable`): dataclasses with options.
        paths (`dict`): from the names of options to their file, folder, list of files or Hub name.
        further (`dict`, *optional*): other facts that change the result of the run.

    Returns:
        `dict`: `command`, `options` and `data`, ready for JSON.
    """
    options: dict[str, Any] = dict(further)
    for group in arguments:
        values = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
        options.update({name: value for name, value in values.items() if name not in WITHOUT_EFFECT})
    data = {name: content_of(path) for name, path in paths.items() if path is not None}
    return json.loads(json.dumps({"command": command, "options": options, "data": data}, default=str))


def content_of(path: Any) -> Any:
    """Describe a path by its content: names without folders, sizes and hashes. A Hub name stays."""
    if isinstance(path, (list, tuple)):
        return [content_of(entry) for entry in path]
    place = Path(path).expanduser()
    if place.is_dir():
        return [content_of(file) for pattern in MODEL_FILES for file in sorted(place.glob(pattern))]
    if not place.is_file():
        return str(path)
    return {"name": place.name, "bytes": place.stat().st_size, "blake2b": file_hash(place)}


def file_hash(path: Path) -> str:
    """Hash a file. Of a file above 1 GiB, hash 64 evenly spread parts of 1 MiB."""
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            while chunk := file.read(PART_BYTES):
                digest.update(chunk)
        else:
            for part in range(NUM_PARTS):
                file.seek(part * (size - PART_BYTES) // (NUM_PARTS - 1))
                digest.update(file.read(PART_BYTES))
    return digest.hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two runs. Options that only one of them has, for example after an update, are left out."""
    if before.get("command") != now["command"]:
        return [f"the command was {before.get('command')}, and is {now['command']}"]
    found = []
    for name, value in now["options"].items():
        if name in before["options"] and before["options"][name] != value:
            found.append(f"--{name} was {before['options'][name]}, and is {value}")
    for name in dict.fromkeys([*before["data"], *now["data"]]):
        if before["data"].get(name) != now["data"].get(name):
            found.append(f"--{name} was {_named(before['data'].get(name))}, and is {_named(now['data'].get(name))}")
    return found


def _named(content: Any) -> str:
    if content is None:
        return "not given"
    if isinstance(content, dict):
        return f"{content['name']} of {content['bytes']:,} bytes ({content['blake2b'][:8]})"
    if isinstance(content, list):
        shown = ", ".join(map(_named, content[:3]))
        return shown if len(content) <= 3 else f"{shown} and {len(content) - 3} more"
    return str(content)
