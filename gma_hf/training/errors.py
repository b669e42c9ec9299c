# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors that the training scripts print as one message instead of a traceback."""

import re
from pathlib import Path


REPOSITORY_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class TrainingInputError(ValueError):
    """The user's data, files or arguments cannot be trained on; the message says what to change."""


class NonFiniteTrainingError(ArithmeticError):
    """The loss or a weight became NaN or infinite; the message names the last good checkpoint."""


def why_not_loaded(name: str, error: Exception) -> str:
    """
    The message for a model or a tokenizer that cannot be loaded. Transformers takes the path of a folder that does not exist
    for the name of a repository, and its error speaks of that.

    Args:
        name (`str`): the folder or the name of a repository, as the user gave it.
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
