# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The size of the state of a model for one sequence, from its configuration alone."""

import copy

import torch
from transformers import PreTrainedConfig

from ..configuration import GMAConfig
from ..conversion.config import GMAConversionConfig
from .slots import SlotLayout


def model_layout(config: PreTrainedConfig, dtype: torch.dtype, num_ranks: int = 1) -> SlotLayout:
    """
    The slots of the GMA layers of a model, native or converted.

    Args:
        config (`PreTrainedConfig`): configuration of the model.
        dtype (`torch.dtype`): dtype of its weights.
        num_ranks (`int`): number of processes that share the heads.

    Returns:
        `SlotLayout`: the state of one layer for one sequence on one rank. A stream costs its `num_bytes` times the number of
        GMA layers.

    Raises:
        ValueError: if the layers of a converted model need slots of different shapes.
    """
    if isinstance(config, GMAConfig):
        return native_layout(config, dtype, num_ranks)
    return converted_layout(GMAConversionConfig.from_dict(config.gma), dtype, num_ranks)


def stream_bytes(config: PreTrainedConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """
    The memory of a stream: the states of the GMA layers, and keys and values of the softmax layers.

    Args:
        config (`PreTrainedConfig`): configuration of the model.
        dtype (`torch.dtype`): dtype of its weights.
        num_tokens (`int`): length of the stream.

    Returns:
        `int`: bytes. vLLM rounds up: it gives whole blocks, and makes a block of keys and values as large as a state.
    """
    if isinstance(config, GMAConfig):
        num_layers = config.layer_types.count("linear_attention")
    else:
        num_layers = len(config.gma["layers"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value_bytes = 2 * config.num_key_value_heads * head_dim * dtype.itemsize
    num_softmax_layers = config.num_hidden_layers - num_layers
    states = num_layers * model_layout(config, dtype).num_bytes if num_layers > 0 else 0
    return states + num_softmax_layers * key_value_bytes * num_tokens


def native_layout(config: GMAConfig, dtype: torch.dtype, num_ranks: int = 1) -> SlotLayout:
    """The slots of a GMA layer of [`GMAModel`]."""
    num_heads, num_key_value_heads = (n // num_ranks for n in (config.num_attention_heads, config.num_key_value_heads))
    channels = (num_heads + num_key_value_heads) * config.routing_dim + num_key_value_heads * config.head_dim
    return SlotLayout(
        num_heads,
        num_key_value_heads,
        config.num_components,
        config.routing_dim,
        config.head_dim,
        window_size=config.window_size,
        num_sink_tokens=config.num_sink_tokens,
        conv_history=(max(0, config.conv_kernel_size - 1), channels),
        has_write_weight=config.use_write_weight,
        # With write weights, decays follow from them
        has_log_decay=config.use_decay and not config.use_write_weight,
        dtype=dtype,
    )


def converted_layout(conversion: GMAConversionConfig, dtype: torch.dtype, num_ranks: int = 1) -> SlotLayout:
    """The slots of a converted layer."""
    names = ("num_heads", "num_key_value_heads", "routing_dim", "value_dim")
    shapes = {
        (*(layer[name] for name in names), layer.get("rotary_dim", 0) > 0) for layer in conversion.layers.values()
    }
    if len(shapes) != 1:
        raise ValueError(
            "The converted layers have heads of different numbers or dimensions, or only some of them undo rotary positions. "
            "vLLM gives all recurrent layers of a model states of one shape, so that this model cannot be served."
        )
    num_heads, num_key_value_heads, key_dim, value_dim, is_turned_back = shapes.pop()
    return SlotLayout(
        num_heads // num_ranks,
        num_key_value_heads // num_ranks,
        conversion.num_components,
        key_dim,
        value_dim,
        window_size=conversion.window_size,
        num_sink_tokens=conversion.num_sink_tokens,
        has_log_decay=conversion.use_forgetting,
        has_routing_keys=is_turned_back or conversion.use_routing_projections,
        dtype=dtype,
    )


def rank_config(config: GMAConfig, num_ranks: int) -> GMAConfig:
    """The configuration of a block with one of `num_ranks` equal parts of the heads and of the MLP."""
    local = copy.deepcopy(config)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(local, name, getattr(config, name) // num_ranks)
    return local
