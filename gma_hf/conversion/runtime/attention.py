# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
GMA as an attention implementation of Transformers.

A converted attention module has its own copy of the configuration, whose attention implementation is `"gma"`; so its own
code calls [`gma_attention_forward`] with the queries, keys and values that softmax would have got. The modules beside it
keep the configuration of the model, and their softmax implementation with it.
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
    Attention of a converted module, with the signature of Transformers' attention functions.

    Args:
        module (`nn.Module`): the attention module; its child `gma` holds the mixtures.
        query, key, value (`torch.Tensor` of shape `(batch, heads, length, dim)`): of the current tokens.
        attention_mask: any mask of Transformers, see [`read_mask`].
        scaling (`float`, *optional*): factor of the window's logits.
        dropout (`float`): not used: there are no attention weights to drop.
        is_causal (`bool`, *optional*): overrides the module's own.
        rotation ([`Rotation`], *optional*): of the current tokens, instead of that of `gma_call`.
        gma_call (`AttentionCall`, *optional*): what the module was told, from its hook.
        gma_layout (`CallLayout`, *optional*): what the model was told of the tokens, from its hook.
        kwargs: `softcap` and `s_aux` (attention sinks) serve the window; `position_ids`, `seq_idx` and `cu_seq_lens_q`
            tell packed sequences apart.

    Returns:
        The output `(batch, length, heads, value_dim)`, and the implied affinity if `output_attentions` was asked for.

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
                f"{type(module).__name__} was not told of the other parts of its sequence: context parallelism needs a model that "
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
    """The layout of a call of an attention module alone, from what its attention function is told."""
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
    """Make `"gma"` known to Transformers; calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, gma_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, gaussian_mixture_mask)
    register_softmax_attention()
