# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of options when they are created, from Python and from a command line."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from transformers import TrainingArguments

from ..compat import LARGEST_INTEGER
from .errors import TrainingInputError


# Numbers of `TrainingArguments` with their kinds and smallest values; Transformers accepts any
TRAINING_NUMBERS = {
    "learning_rate": (float, 0),
    "weight_decay": (float, 0),
    "max_grad_norm": (float, 0),
    "warmup_steps": (float, 0),
    "num_train_epochs": (float, 0),
    "max_steps": (int, -1),
    "per_device_train_batch_size": (int, 1),
    "per_device_eval_batch_size": (int, 1),
    "gradient_accumulation_steps": (int, 1),
    "dataloader_num_workers": (int, 0),
    "adam_beta1": (float, 0),
    "adam_beta2": (float, 0),
    "adam_epsilon": (float, 0),
    "label_smoothing_factor": (float, 0),
    "save_total_limit": (int, 1),
    "seed": (int, 0),
    "data_seed": (int, 0),
}


def check_training_numbers(options: TrainingArguments) -> None:
    """
    Check the numbers of `TrainingArguments`.

    Raises:
        ValueError: with the first wrong number, its value, and the expected values.
    """
    for name, (kind, smallest) in TRAINING_NUMBERS.items():
        value = getattr(options, name, None)
        expected = None if value is None else why_no_number(value, kind, smallest)
        if expected is not None:
            raise TrainingInputError(f"`{name}` must {expected}, got {value!r}.")


def check_options(options: Any, names: Iterable[str] | None = None, **smallest: float) -> None:
    """
    Check that every option has the type of its annotation: a whole number is not `True` and not 2.5, a number is finite, and
    neither is below its smallest value.

    Args:
        options (`Any`): an instance of a dataclass.
        names (`Iterable[str]`, *optional*): the options to check; by default all.
        smallest (`float`, *optional*): the smallest values of options, by name; 0 for other numbers.

    Raises:
        TrainingInputError: with the first wrong option, its value, and the expected values.
    """
    hints = typing.get_type_hints(type(options))
    for name in [field.name for field in dataclasses.fields(options)] if names is None else names:
        value = getattr(options, name)
        expected = why_not(value, hints[name], smallest.get(name, 0))
        if expected is not None:
            # Subclasses of `TrainingArguments` are also used from Python, so their messages do not name command line options
            label = f"`{name}`" if isinstance(options, TrainingArguments) else f"--{name}"
            raise TrainingInputError(f"{label} must {expected}, got {value!r}.")


def why_not(value: Any, hint: Any, smallest: float) -> str | None:
    """What a value must be, or `None` if it is correct."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return None if value in choices else f"be one of {', '.join(map(repr, choices))}"
    if typing.get_origin(kind) is list:
        is_list = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        return None if is_list else "be a list of strings"
    if kind in (int, float):
        return why_no_number(value, kind, smallest)
    if kind in (bool, str) and not isinstance(value, kind):
        return "be True or False" if kind is bool else "be a string"
    return None


def why_no_number(value: Any, kind: type, smallest: float) -> str | None:
    """What a number must be, or `None` if the value is correct."""
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        return "be a whole number" if kind is int else "be a finite number"
    if value < smallest:
        return f"be at least {smallest}" if smallest else "not be negative"
    return f"be at most {LARGEST_INTEGER}" if value > LARGEST_INTEGER else None
