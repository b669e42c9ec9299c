# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of a configuration. Every error is a `ValueError`, whichever library finds it, also for misspelt fields."""

import difflib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import fields

from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


POSITION_EMBEDDING_TYPES = ("learned", "rope", "none")
PRIOR_INITS = ("uniform", "balanced")
MEAN_INITS = ("normal", "orthogonal")
LAYER_TYPES = ("linear_attention", "full_attention")


class FieldValueError(StrictDataclassFieldValidationError, ValueError):
    """A field of a configuration has a wrong type."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


class ConfigurationValueError(StrictDataclassClassValidationError, ValueError):
    """A configuration has an impossible value or combination of values."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


def translated(method: Callable) -> Callable:
    """A method whose validation errors are also `ValueError`s."""

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
    """Decorator for a class that `@strict` validates: its errors are `ValueError`s, and the errors of `@strict`, too."""
    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, translated(getattr(cls, name)))
    return cls


def refuse_misspelt(cls: type[PreTrainedConfig], names: Iterable[str]) -> None:
    """
    Refuse names that are very similar to names of fields: a configuration would keep them, and no model would read them.
    Names that resemble no field are left to Transformers, which keeps them as attributes.

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


def expect_possible(config: PreTrainedConfig) -> None:
    """
    Check the values and combinations of a `GMAConfig`.

    Raises:
        ValueError: for impossible values and combinations, with the valid choice.
    """
    for name in (
        "vocab_size",
        "intermediate_size",
        "num_key_value_heads",
        "head_dim",
        "routing_dim",
        "num_components",
        "max_position_embeddings",
        "read_eps",
        "variance_floor",
        "rms_norm_eps",
        "time_step_min",
    ):
        expect_positive(config, name)
    for name in ("mean_init_std", "initializer_range"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"`{name}` must not be negative, got {getattr(config, name)}.")
    for name in ("mean_init_std", "initializer_range", "variance_init", "time_step_max"):
        expect_finite(config, name)
    for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(config, name)}.")

    if config.num_attention_heads % config.num_key_value_heads != 0:
        raise ValueError(
            f"`num_key_value_heads` ({config.num_key_value_heads}) must divide `num_attention_heads` "
            f"({config.num_attention_heads})."
        )
    if config.position_embedding_type not in POSITION_EMBEDDING_TYPES:
        raise ValueError(
            f"`position_embedding_type` must be one of {list(POSITION_EMBEDDING_TYPES)}, "
            f"got {config.position_embedding_type!r}."
        )
    if config.prior_init not in PRIOR_INITS:
        raise ValueError(f"`prior_init` must be one of {list(PRIOR_INITS)}, got {config.prior_init!r}.")
    if config.mean_init not in MEAN_INITS:
        raise ValueError(f"`mean_init` must be one of {list(MEAN_INITS)}, got {config.mean_init!r}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {config.hidden_act!r}.")
    unknown_layer_types = sorted(set(config.layer_types) - set(LAYER_TYPES))
    if unknown_layer_types:
        raise ValueError(
            f"`layer_types` must hold 'linear_attention' (GMA) and 'full_attention' (softmax) only, "
            f"got {unknown_layer_types}."
        )
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"`layer_types` needs one entry per layer: `num_hidden_layers` is {config.num_hidden_layers}, "
            f"but it has {len(config.layer_types)} entries. Change both together."
        )
    if config.position_embedding_type == "rope":
        rope_types = ["default", *ROPE_INIT_FUNCTIONS]
        if config.rope_parameters["rope_type"] not in rope_types:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {rope_types}, "
                f"got {config.rope_parameters['rope_type']!r}."
            )
        rotated = {"head_dim": "full_attention" in config.layer_types, "routing_dim": config.rope_on_routing}
        for name, is_rotated in rotated.items():
            if is_rotated and getattr(config, name) % 2 != 0:
                raise ValueError(
                    f"RoPE rotates pairs of dimensions: `{name}` must be even, got {getattr(config, name)}."
                )
    if config.use_decay and not config.is_causal:
        raise ValueError(
            "`use_decay=True` needs `is_causal=True`: a bidirectional layer has no order in which to forget. "
            "Set `use_decay=False` for an encoder."
        )
    if config.conv_kernel_size < 0 or config.conv_kernel_size == 1:
        raise ValueError(
            f"`conv_kernel_size` must be 0 (no short convolution) or at least 2, got {config.conv_kernel_size}."
        )
    if config.window_size < 0:
        raise ValueError(f"`window_size` must be 0 (no window) or at least 1, got {config.window_size}.")
    if config.num_sink_tokens < 0:
        raise ValueError(f"`num_sink_tokens` must be 0 (none) or at least 1, got {config.num_sink_tokens}.")
    if config.num_sink_tokens > 0 and (config.window_size == 0 or not config.is_causal):
        raise ValueError(
            "`num_sink_tokens` needs `window_size` above 0 and `is_causal=True`: the softmax of a window keeps sink tokens visible. "
            f"Got window_size={config.window_size} and is_causal={config.is_causal}. Set `num_sink_tokens` to 0."
        )
    if config.correlate and (config.normalize_read or config.num_components < 2 or config.window_size > 0):
        raise ValueError(
            "`correlate=True` needs `normalize_read=False`, `num_components` of at least 2 and `window_size=0`: the "
            "weights of correlated routes have signs, so their sum cannot be a divisor. Got "
            f"normalize_read={config.normalize_read}, num_components={config.num_components}, "
            f"window_size={config.window_size}."
        )
    if config.use_delta_rule and (
        not config.is_causal or config.normalize_read or config.use_write_weight or config.window_size > 0
    ):
        raise ValueError(
            "`use_delta_rule=True` needs `is_causal=True`, `normalize_read=False`, `use_write_weight=False` and `window_size=0`: "
            "a token corrects the plain sum that the tokens before it wrote, and its own strength says how much it writes. Got "
            f"is_causal={config.is_causal}, normalize_read={config.normalize_read}, "
            f"use_write_weight={config.use_write_weight}, window_size={config.window_size}."
        )
    if config.head_norm_eps is not None:
        expect_positive(config, "head_norm_eps")
        if config.normalize_read and not config.use_output_gate:
            raise ValueError(
                "`head_norm_eps` is given, but there is no norm per head: set `use_output_gate=True` or "
                "`normalize_read=False`, or leave it out."
            )
    if not config.variance_init > config.variance_floor:
        raise ValueError(
            f"`variance_init` ({config.variance_init}) must exceed `variance_floor` ({config.variance_floor})."
        )
    if not config.time_step_max >= config.time_step_min:
        raise ValueError(
            f"`time_step_max` ({config.time_step_max}) must not be below `time_step_min` ({config.time_step_min})."
        )
    rates = config.decay_rate_range
    if len(rates) != 2 or not 0 < rates[0] <= rates[1] < math.inf:
        raise ValueError(
            f"`decay_rate_range` must be two finite numbers (low, high) with 0 < low <= high, got {rates}."
        )


def expect_positive(config: PreTrainedConfig, name: str):
    if not getattr(config, name) > 0:  # so that NaN is refused too
        raise ValueError(f"`{name}` must be positive, got {getattr(config, name)}.")
    expect_finite(config, name)


def expect_finite(config: PreTrainedConfig, name: str):
    if not math.isfinite(getattr(config, name)):
        raise ValueError(f"`{name}` must be a finite number, got {getattr(config, name)}.")
