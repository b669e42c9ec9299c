# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that load with `trust_remote_code=True` in programs that never import gma_hf."""

import os
from pathlib import Path


REMOTE_CODE_MODULE = "gma_remote"

# Transformers checks the imports of such a file before it runs it, and names a missing package in its error together with
# the command that installs it. So a few lines that import the package are all a checkpoint needs; the code itself stays in
# one place.
REMOTE_CODE = """\
# Loads this checkpoint in programs that do not import gma_hf themselves. It needs the package: pip install gma_hf
from {module} import (
    {class_names},
)
"""

AUTO_CLASSES = {
    "AutoConfig": "GMAConfig",
    "AutoModel": "GMAModel",
    "AutoModelForCausalLM": "GMAForCausalLM",
    "AutoModelForMaskedLM": "GMAForMaskedLM",
    "AutoModelForSequenceClassification": "GMAForSequenceClassification",
    "AutoModelForTokenClassification": "GMAForTokenClassification",
    "AutoModelForQuestionAnswering": "GMAForQuestionAnswering",
}


def add_remote_code(config, save_directory: str | os.PathLike):
    """
    Write the remote-code file into `save_directory` and point `config.auto_map` to it.

    Args:
        config (`GMAConfig`): gains the attribute `auto_map`, which Transformers reads from config.json.
        save_directory (`str` or `os.PathLike`): the checkpoint's folder; created if missing.
    """
    config.auto_map = write_remote_code(save_directory, "gma_hf", AUTO_CLASSES)


def write_remote_code(save_directory: str | os.PathLike, module: str, auto_classes: dict[str, str]) -> dict[str, str]:
    """
    Write the remote-code file into `save_directory`.

    Args:
        save_directory (`str` or `os.PathLike`): the checkpoint's folder; created if missing.
        module (`str`): where the classes can be imported from.
        auto_classes (`dict[str, str]`): from the names of Auto classes to the names of what they load.

    Returns:
        `dict[str, str]`: the `auto_map` of the checkpoint's config.json.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Give a folder to save the checkpoint to.")
    folder.mkdir(parents=True, exist_ok=True)
    class_names = ",\n    ".join(sorted(set(auto_classes.values())))
    source = REMOTE_CODE.format(module=module, class_names=class_names)
    (folder / f"{REMOTE_CODE_MODULE}.py").write_text(source, encoding="utf-8")
    return {auto_class: f"{REMOTE_CODE_MODULE}.{name}" for auto_class, name in auto_classes.items()}
