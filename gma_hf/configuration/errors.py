# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What is wrong with a configuration is a `ValueError`, whichever library finds it; a misspelt field is wrong."""

import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import fields

from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import GenerationConfig, PreTrainedConfig


class FieldValueError(StrictDataclassFieldValidationError, ValueError):
    """A field of a configuration has a wrong type."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


class ConfigurationValueError(StrictDataclassClassValidationError, ValueError):
    """A configuration has an impossible value or combination of values."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


def translated(method: Callable) -> Callable:
    """A method whose validation errors are `ValueError`s as well."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except ValueError:
            raise
        except StrictDataclassFieldValidationError as error:
            raise FieldValueError(str(error)) from error.__cause__
        except StrictDataclassClassValidationError as error:
            raise ConfigurationValueError(str(error)) from error.__cause__

    return call


def raises_value_errors(cls: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Decorator of a class that `@strict` validates: its errors are `ValueError`s, and what `@strict` raises, too."""
    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, translated(getattr(cls, name)))
    return cls


def refuse_misspelt(cls: type[PreTrainedConfig], names: Iterable[str]) -> None:
    """
    Refuse names that are nearly those of fields: a configuration would keep them, and no model would read them. Names that
    resemble no field are left to Transformers, which keeps them as attributes.

    Raises:
        ValueError: with the field that was probably meant.
    """
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = [field.name for field in fields(cls) if field.name not in inherited]
    for name in names:
        if name in own or name in inherited or name.endswith("_token_id") or name.startswith("_"):
            continue
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        if near and not hasattr(PreTrainedConfig, name) and not hasattr(GenerationConfig(), name):
            raise ValueError(f"`{cls.__name__}` has no field `{name}`. Did you mean `{near[0]}`?")
