# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that programs without `import gma_hf` load with `trust_remote_code=True`."""

import os
import threading
from pathlib import Path

from transformers import PreTrainedConfig

from . import __version__


REMOTE_CODE_MODULE = "gma_remote"
_loading = threading.RLock()

# The package comes from the repository. No package index has a gma_hf of this project. Anyone could register the name there,
# and run code on the machines of users who install it from there.
HOW_TO_INSTALL = "in a clone of the repository of gma_hf, run `pip install .`"

# Transformers checks the imports of such a file before it runs the file, and tells the user to `pip install` missing
# packages. It ignores imports inside of `try`, so the file itself can say where the package comes from.
REMOTE_CODE = """\
# Loads this checkpoint in programs that do not import gma_hf themselves. The package must be installed.
try:
    from {module} import (
        {class_names},
    )
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "gma_hf":
        raise
    raise ImportError("This checkpoint needs the package gma_hf: {how_to_install}.") from error
"""


class LoadsAlone:
    """
    Loads one model at a time, whichever threads load. It stands before the model among the bases.

    While Transformers loads a model, it turns the tying of weights off for the whole process. Two threads that load at the same time
    would get models without output embeddings, and the tying would stay off.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model. See [`PreTrainedModel.from_pretrained`] for the arguments."""
        with _loading:
            return super().from_pretrained(*args, **kwargs)


AUTO_CLASSES = {
    "AutoConfig": "GMAConfig",
    "AutoModel": "GMAModel",
    "AutoModelForCausalLM": "GMAForCausalLM",
    "AutoModelForMaskedLM": "GMAForMaskedLM",
    "AutoModelForSequenceClassification": "GMAForSequenceClassification",
    "AutoModelForTokenClassification": "GMAForTokenClassification",
    "AutoModelForQuestionAnswering": "GMAForQuestionAnswering",
}


def add_remote_code(
    config: PreTrainedConfig,
    save_directory: str | os.PathLike,
    module: str = "gma_hf",
    auto_classes: dict[str, str] | None = None,
):
    """
    Write the remote-code file into `save_directory`, and point `config.auto_map` to it.

    Args:
        config (`PreTrainedConfig`): the configuration. It gets the attribute `auto_map`, which Transformers reads from
            config.json, and `gma_hf_version`, with which an older gma_hf can say that it may not know all fields.
        save_directory (`str` or `os.PathLike`): the folder of the checkpoint; it is created if it does not exist.
        module (`str`, *optional*, defaults to `"gma_hf"`): the module that has the classes.
        auto_classes (`dict[str, str]`, *optional*): from the names of Auto classes to the names of their classes; by default
            the native models.
    """
    config.auto_map = write_remote_code(save_directory, module, AUTO_CLASSES if auto_classes is None else auto_classes)
    config.gma_hf_version = __version__


def write_remote_code(save_directory: str | os.PathLike, module: str, auto_classes: dict[str, str]) -> dict[str, str]:
    """
    Write the remote-code file into `save_directory`.

    Args:
        save_directory (`str` or `os.PathLike`): the folder of the checkpoint; it is created if it does not exist.
        module (`str`): the module that has the classes.
        auto_classes (`dict[str, str]`): from the names of Auto classes to the names of their classes.

    Returns:
        `dict[str, str]`: the `auto_map` for the config.json of the checkpoint.
    """
    folder = expect_no_file(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    class_names = ",\n        ".join(sorted(set(auto_classes.values())))
    source = REMOTE_CODE.format(module=module, class_names=class_names, how_to_install=HOW_TO_INSTALL)
    write_whole(folder / f"{REMOTE_CODE_MODULE}.py", source)
    return {auto_class: f"{REMOTE_CODE_MODULE}.{name}" for auto_class, name in auto_classes.items()}


def expect_no_file(save_directory: str | os.PathLike) -> Path:
    """
    The folder that a checkpoint is to be saved to. Transformers only logs that it is a file, and saves nothing.

    Raises:
        ValueError: if it is a file, or a link to a folder that does not exist.
    """
    folder = Path(save_directory)
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {folder.resolve()}, which does not exist. Make this folder first.")
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Give a folder to save the checkpoint to.")
    return folder


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a file in one step: after an error, such as a full disk, the older file is still there, whole."""
    temporary = f"{os.fspath(path)}.unfinished"
    try:
        Path(temporary).write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
