# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The name of the cache among the arguments and outputs of a model. It depends on the version of Transformers:
`past_key_values`, and `cache` from 5.24 on. A model that gets its cache under the other name would ignore it without any
message.
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
# The name of the cache in the installed version
CACHE_NAME = "cache" if any(x.name == "cache" for x in dataclasses.fields(BaseModelOutputWithPast)) else OLD_CACHE_NAME


def takes_cache(forward: Callable) -> Callable:
    """
    Let a `forward` with an argument `cache` take the cache under the name of the installed version of Transformers. If the
    models of Transformers also take the old name, with a warning, so does this `forward`.

    Args:
        forward (`Callable`): a `forward` with an argument `cache`.

    Returns:
        `Callable`: the same `forward`, with the name of the installed version in its signature.
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
    Of the two names of a cache since Transformers 5.24, keep the name that holds the cache. Transformers would keep the new
    name, even if it holds `None`.

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
    Give the wrapper of PEFT the cache under both names. PEFT 0.21 wraps `prepare_inputs_for_generation` of an instance, and
    looks there for the old name. Without it, PEFT would put the learned prompt of prompt tuning before every new token.

    Args:
        prepare (`Callable`): the `prepare_inputs_for_generation` of a class.

    Returns:
        `Callable`: the same function, for models whose `forward` uses [`keep_one_name`].
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
    Check that the cache is a `Cache`, and that no unknown argument is one. A model ignores unknown arguments, so it would
    begin a new text.

    Args:
        cache (`Any`): the argument for the cache.
        others (`dict[str, Any]`): the arguments that the model does not know.

    Raises:
        ValueError: if the cache is no `Cache`, or an unknown argument is a cache.
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
    """The message for a cache under an unknown name."""
    return (
        f"A cache was passed as `{name}`. The model does not know this argument: it would ignore the cache and begin a new text. With "
        f"Transformers {transformers.__version__}, pass the cache as `{CACHE_NAME}`."
    )


def foreign_content(layer: Any, layer_idx: int) -> str:
    """The message for a cache layer with keys and values of softmax attention, which cannot serve a GMA layer."""
    return (
        f"Layer {layer_idx} of the cache already holds a {type(layer).__name__} with content, but layer {layer_idx} of the model is a "
        "GMA layer, which continues from a running state and not from keys and values. If prefix tuning (`PrefixTuningConfig`) put "
        "learned keys and values there: use prompt tuning (`PromptTuningConfig`) or LoRA, which work with GMA layers. If another "
        "model filled the cache: start with a new cache."
    )
