# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Calls of converted models under context parallelism. Converted layers find the whole rows in their layout. The remaining
softmax layers belong to Transformers: within context parallelism, their attention implementation [`IMPLEMENTATION`] gathers
keys and values; elsewhere it is "sdpa".
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...compat import attention_implementation
from ...modeling.layout import Layout
from ...parallel.context import ContextParallel, current_context


IMPLEMENTATION = "gma_context_sdpa"


def layout_of_part(
    context: ContextParallel,
    model: PreTrainedModel,
    given: dict[str, Any],
    tokens: Tensor,
    padding_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    counts_positions: bool,
    takes_positions: bool,
    has_softmax: bool,
) -> Layout:
    """
    The layout of a part. `given` also gets the positions of its tokens in whole rows.

    Raises:
        ValueError: for calls that a converted model cannot compute on a part.
    """
    name = type(model).__name__
    if has_softmax and attention_implementation(model.config) != IMPLEMENTATION:
        raise ValueError(
            f"The softmax layers of {name} see the keys of this process alone. Call "
            f"`model.set_attn_implementation({IMPLEMENTATION!r})`, with which they gather the keys of all processes."
        )
    if has_softmax and cache is not None and not getattr(cache, "gma_gathers", False):
        raise ValueError(
            "The softmax layers of this model would put the keys of one part into the cache. Use `context.prefill(model, **inputs)`, "
            "or pass `use_cache=False`."
        )
    layout = context.layout_of(tokens, padding_mask, position_ids, cache, given)
    if position_ids is None and not counts_positions:
        hint = "Pass `position_ids` of whole rows to `context.split`." if takes_positions else "Use data parallelism."
        raise ValueError(
            f"{name} finds the positions of its tokens by itself, and would start each part of a sequence at the first one. {hint}"
        )
    if position_ids is None:
        given["position_ids"] = layout.row.positions(tokens.device).expand(tokens.shape[0], -1)
    if has_softmax and cache is None:
        given["use_cache"] = False
    return layout


def softmax_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    gma_layout: Any = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Softmax attention over the keys of all processes, with the signature of the attention functions of Transformers."""
    row = None if gma_layout is None or gma_layout.layout is None else gma_layout.layout.row
    if row is None:
        if current_context() is not None:
            raise ValueError(
                f"{type(module).__name__} does not know the other parts of its sequence: context parallelism needs a model that passes "
                "further arguments on to its attention layers. Use data parallelism."
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sliding_window = kwargs.get("sliding_window")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or (sliding_window is not None and not causal):
        raise ValueError(
            f"Context parallelism has no softmax layers with {', '.join(unknown) or 'windows to both sides'}. Convert these layers "
            "too, or use data parallelism."
        )
    keys, values = row.gather_keys(key, value)
    output = row.softmax(
        query, keys, values, causal=causal, scaling=scaling, dropout=dropout, sliding_window=sliding_window
    )
    return output.transpose(1, 2).contiguous(), None


def softmax_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """
    No mask under context parallelism, because the layout says which tokens see each other; otherwise the mask of "sdpa".
    """
    return None if current_context() is not None else sdpa_mask(*args, **kwargs)


def register_softmax_attention() -> None:
    """Register the implementation with Transformers. A second call changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, softmax_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, softmax_mask)
