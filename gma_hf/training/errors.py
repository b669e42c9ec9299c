# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors that the training commands print as one message, without a traceback."""

import re
from pathlib import Path


REPOSITORY_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class TrainingInputError(ValueError):
    """The data, the files or the arguments of the user cannot be trained on. The message says what to change."""


class NonFiniteTrainingError(ArithmeticError):
    """The loss or a weight became NaN or infinite. The message names the last good checkpoint."""


def why_not_loaded(name: str, error: Exception) -> str:
    """
    The message for a model or a tokenizer that cannot be loaded. For a folder that does not exist, the error of Transformers
    speaks of a repository, so this function writes another message.

    Args:
        name (`str`): the folder or the name of a repository, as the user wrote it.
        error (`Exception`): the error of Transformers.

    Returns:
        `str`: one message.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return f"{name} is a file. Give the folder that `save_pretrained` wrote."
    if path.is_dir():
        return str(error)
    if REPOSITORY_NAME.fullmatch(name):
        return f"There is no folder {name!r} here, and as a repository of the hub it cannot be loaded: {error}"
    return f"There is no folder {name!r}. Give the folder that `save_pretrained` wrote, or the name of a repository."
