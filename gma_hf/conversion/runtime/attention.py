# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
GMA as an attention implementation of Transformers.

A converted attention module has its own copy of the configuration, with the attention implementation `"gma"`. So its own
code calls [`gma_attention_forward`] with the queries, keys and values for softmax. The other modules keep the configuration
of the model, and with it their softmax implementation.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...compat import attention_implementation
from ...modeling.layout import Layout, find_sequence_ids
from ...ops.rotation.functional import Rotation
from ...parallel.context import current_context
from .calls import AttentionCall, CallLayout
from .masks import gaussian_mixture_mask, read_mask
from .parts import register_softmax_attention


IMPLEMENTATION = "gma"


def gma_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    rotation: Rotation | None = None,
    gma_call: AttentionCall | None = None,
    gma_layout: CallLayout | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """
    The attention of a converted module, with the signature of the attention functions of Transformers.

    Args:
        module (`nn.Module`): the attention module. Its child `gma` holds the mixtures.
        query, key, value (`torch.Tensor` of shape `(batch, heads, length, dim)`): states of the current tokens.
        attention_mask (`Any`): any mask of Transformers, see [`read_mask`].
        scaling (`float`, *optional*): factor of the logits of the window.
        dropout (`float`, *optional*, defaults to `0.0`): not used, because there are no attention weights to drop.
        is_causal (`bool`, *optional*): overrides `is_causal` of the module.
        rotation ([`Rotation`], *optional*): rotation of the current tokens; by default the rotation in `gma_call`.
        gma_call (`AttentionCall`, *optional*): what the hook of the module recorded.
        gma_layout (`CallLayout`, *optional*): what the hook of the model recorded.
        kwargs (`Any`, *optional*): `softcap` and `s_aux` (attention sinks) for the window; `position_ids`, `seq_idx` and
            `cu_seq_lens_q` for packed sequences.

    Returns:
        `tuple[torch.Tensor, torch.Tensor or None]`: the output `(batch, length, heads, value_dim)`, and the implied affinity
        if `output_attentions` was requested.

    Raises:
        ValueError: if the module was not converted.
    """
    if not hasattr(module, "gma"):
        raise ValueError(
            f"`attn_implementation='gma'` reached a {type(module).__name__} that has no mixtures. Convert the model with "
            "`gma_hf.convert_to_gma(model)`; its softmax layers take 'sdpa', 'eager' or 'flash_attention_2'."
        )
    if kwargs.get("cache") is not None:
        raise ValueError("GMA layers have no paged cache. Use `generate` without continuous batching.")
    call = AttentionCall() if gma_call is None else gma_call
    causal = module.gma.is_causal if is_causal is None else is_causal
    if gma_layout is not None:
        layout = gma_layout.of(attention_mask, query, call.cache_layer, causal)
    else:
        if current_context() is not None:
            raise ValueError(
                f"{type(module).__name__} does not know the other parts of its sequence: context parallelism needs a model that "
                "takes `attention_mask` and passes further arguments on to its attention layers. Use data parallelism."
            )
        layout = layout_of(module, query, attention_mask, call.cache_layer, causal, kwargs)
    output, weights = module.gma(
        query,
        key,
        value,
        layout,
        scaling=scaling,
        is_causal=causal,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        rotation=call.rotation if rotation is None else rotation,
        cache_layer=call.cache_layer,
        output_attentions=call.output_attentions,
    )
    return output.transpose(1, 2).contiguous(), weights


def layout_of(
    module: nn.Module, query: Tensor, attention_mask: Any, cache_layer: Any, is_causal: bool, told: dict[str, Any]
) -> Layout:
    """The layout of a call of an attention module alone, from the arguments of its attention function."""
    batch_size, _, length, _ = query.shape
    padding_mask, sequence_ids = read_mask(attention_mask, query, cache_layer, is_causal)
    if sequence_ids is None:
        # Flash attention takes packed sequences from the positions, not from its mask
        by_position = "flash" in (attention_implementation(module.softmax_config) or "")
        position_ids = told.get("position_ids") if by_position else None
        if position_ids is not None and position_ids.ndim != 2:
            position_ids = None
        sequence_ids = find_sequence_ids(
            batch_size, length, padding_mask, position_ids, told.get("seq_idx"), told.get("cu_seq_lens_q")
        )
    return Layout(batch_size, length, padding_mask, sequence_ids)


def register_attention() -> None:
    """Register `"gma"` with Transformers. A second call changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, gma_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, gaussian_mixture_mask)
    register_softmax_attention()
