# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
GMA as an attention implementation of Transformers.

A converted attention module has its own copy of the configuration, whose attention implementation is `"gma"`; so its own
code calls [`gma_attention_forward`] with the queries, keys and values that softmax would have got. The modules beside it
keep the configuration of the model, and their softmax implementation with it.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from ...compat import attention_implementation, collected_outputs
from .cache import ConvertedCacheMixin, converted_cache_layer
from .masks import gaussian_mixture_mask
from .rotation import Rotation, find_position_embeddings


IMPLEMENTATION = "gma"


class AttentionCall(NamedTuple):
    """What an attention module is told and its attention function is not."""

    cache_layer: ConvertedCacheMixin | None = None  # the layer's part of the cache
    output_attentions: bool = False
    rotation: Rotation | None = None  # of the current tokens


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
        rotation ([`Rotation`], *optional*): of the current tokens, if the module's own call is over.
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
    # Flash attention takes packed sequences from the positions, not from its mask
    by_position = "flash" in (attention_implementation(module.softmax_config) or "")
    position_ids = kwargs.get("position_ids") if by_position else None
    call = module.gma_call
    output, weights = module.gma(
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        is_causal=is_causal,
        position_ids=position_ids if position_ids is not None and position_ids.ndim == 2 else None,
        seq_idx=kwargs.get("seq_idx"),
        cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        rotation=call.rotation if rotation is None else rotation,
        cache_layer=call.cache_layer,
        output_attentions=call.output_attentions,
    )
    return output.transpose(1, 2).contiguous(), weights


def begin_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a converted module: keeps, in `module.gma_call`, what its attention function is not told."""
    cache = next((argument for argument in (*args, *kwargs.values()) if isinstance(argument, Cache)), None)
    cache_layer = None if cache is None else converted_cache_layer(cache, module.layer_idx)
    # Some models pass the wish on to their attention, the others leave it to what collects the outputs
    output_attentions = bool(kwargs.get("output_attentions")) or any(
        "attentions" in name for name in collected_outputs()
    )
    embeddings = find_position_embeddings(args, kwargs) if module.gma_rotary is not None else None
    rotation = None if embeddings is None else Rotation(module.gma_rotary, *embeddings)
    module.gma_call = AttentionCall(cache_layer, output_attentions, rotation)


def end_call(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a converted module: the cache is not kept alive by the model."""
    module.gma_call = AttentionCall()


def register_attention() -> None:
    """Make `"gma"` known to Transformers; calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, gma_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, gaussian_mixture_mask)
