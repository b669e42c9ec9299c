# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The name of the cache among the arguments and the outputs of a model. It depends on the version of Transformers: `past_key_values`,
and `cache` since 5.24. A model that was handed its cache under another name would ignore the cache, without a word.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import is_torchdynamo_compiling


OLD_CACHE_NAME = "past_key_values"
# What the installed version calls the cache
CACHE_NAME = "cache" if any(x.name == "cache" for x in dataclasses.fields(BaseModelOutputWithPast)) else OLD_CACHE_NAME


def takes_cache(forward: Callable) -> Callable:
    """
    Let a `forward` with an argument `cache` take the cache under the name that the installed version of Transformers uses. Where
    Transformers' own models also take the old name, with a warning, so does this one.

    Args:
        forward (`Callable`): a `forward` with an argument `cache`.

    Returns:
        `Callable`: the same `forward`; its signature has the name of the installed version.
    """

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        keep_one_name(kwargs)
        if CACHE_NAME == OLD_CACHE_NAME:
            if kwargs.pop("cache", None) is not None:
                raise ValueError(unknown_cache("cache"))
        elif OLD_CACHE_NAME in kwargs and not is_torchdynamo_compiling():
            warnings.warn(
                f"`{OLD_CACHE_NAME}` is deprecated and will be removed in version 5.40.0 of Transformers. Use `cache` instead.",
                FutureWarning,
                stacklevel=2,
            )
        for name in (CACHE_NAME, OLD_CACHE_NAME):
            if name in kwargs:
                kwargs["cache"] = kwargs.pop(name)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [x.replace(name=CACHE_NAME) if x.name == "cache" else x for x in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper


def keep_one_name(given: dict[str, Any]) -> None:
    """
    Of the two names that a cache has since Transformers 5.24, leave the one that holds it. Transformers would keep the new name,
    whatever it holds.

    Args:
        given (`dict[str, Any]`): the arguments of a model; changed in place.

    Raises:
        ValueError: if there are two caches.
    """
    if CACHE_NAME == OLD_CACHE_NAME or not (CACHE_NAME in given and OLD_CACHE_NAME in given):
        return
    new, old = given[CACHE_NAME], given[OLD_CACHE_NAME]
    if new is not None and old is not None and new is not old:
        raise ValueError(
            f"Two different caches were passed, as `{CACHE_NAME}` and as `{OLD_CACHE_NAME}`. Pass one, as `{CACHE_NAME}`. If prefix "
            "tuning (`PrefixTuningConfig`) made one of them: GMA layers cannot start from learned keys and values; use prompt "
            "tuning (`PromptTuningConfig`) or LoRA."
        )
    del given[CACHE_NAME if new is None and old is not None else OLD_CACHE_NAME]


def tells_wrappers(prepare: Callable) -> Callable:
    """
    PEFT wraps `prepare_inputs_for_generation` of an instance, and PEFT 0.21 looks there for the cache under the old name. Where it
    found none, it would put the learned prompt of prompt tuning before every new token. So a wrapper is told both names.

    Args:
        prepare (`Callable`): the `prepare_inputs_for_generation` of a class.

    Returns:
        `Callable`: the same, for models whose `forward` knows [`keep_one_name`].
    """

    @functools.wraps(prepare)
    def wrapper(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        if (
            CACHE_NAME != OLD_CACHE_NAME
            and "prepare_inputs_for_generation" in vars(self)
            and inputs.get(CACHE_NAME) is not None
        ):
            inputs[OLD_CACHE_NAME] = inputs[CACHE_NAME]
        return inputs

    return wrapper


def expect_known_cache(cache: Any, others: dict[str, Any]) -> None:
    """
    A model ignores the arguments that it does not know. A cache among them must not be ignored: the model would begin anew.

    Args:
        cache (`Any`): what was given as the cache.
        others (`dict[str, Any]`): the arguments that the model does not know.

    Raises:
        ValueError: if the cache is no `Cache`, or if there is a cache among the unknown arguments.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`{CACHE_NAME}` is a {type(cache).__name__}, and must be a `Cache` of Transformers, for instance "
            "`DynamicCache(config=model.config)`."
        )
    for name, value in others.items():
        if isinstance(value, Cache) or (name in ("cache", OLD_CACHE_NAME) and value is not None):
            raise ValueError(unknown_cache(name))


def unknown_cache(name: str) -> str:
    """Why a cache under some name is refused."""
    return (
        f"A cache was passed as `{name}`. The model does not know this argument: it would ignore the cache and begin a new text. With "
        f"Transformers {transformers.__version__}, pass the cache as `{CACHE_NAME}`."
    )
