# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The softmax layers of hybrids: every process gathers the keys and values of all processes for its own queries. The gradients
of keys and values return to their processes. This message grows with the length of the sequence; the message of a memory
does not.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from ..ops.attention.mixture import repeat_heads
from .collectives import gather_tokens


if TYPE_CHECKING:
    from .row import Row


def gather_keys(row: "Row", keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `(batch, heads, total, dim)` of the whole rows, in one message."""
    joined, _ = gather_tokens(row.context.group, torch.cat([keys, values.to(keys.dtype)], dim=-1), 2, row.lengths)
    return joined[..., : keys.shape[-1]], joined[..., keys.shape[-1] :].to(values.dtype)


def visible_pairs(row: "Row", causal: bool, device: torch.device, sliding_window: int | None = None) -> Tensor:
    """
    Which of all tokens a query of this part sees, `(batch or 1, 1, length, total)`. PyTorch returns 0 for a query that sees
    none.
    """
    asking = torch.arange(row.start, row.end, device=device)[:, None]
    places = torch.arange(row.total, device=device)
    visible = (places <= asking if causal else torch.ones_like(places <= asking))[None]
    if sliding_window is not None:
        visible = visible & (places > asking - sliding_window)
    if row.padding_mask is not None:
        visible = visible & row.padding_mask[:, None]
    if row.sequence_ids is not None:
        visible = visible & (row.part(row.sequence_ids)[..., None] == row.sequence_ids[:, None])
    return visible[:, None]


def softmax_attention(
    row: "Row",
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool,
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """
    Softmax attention of the queries of this part over the keys of whole rows.

    Args:
        row ([`Row`]): the layout of the whole rows.
        query (`torch.Tensor` of shape `(batch, num_heads, length, head_dim)`): queries of this part.
        keys, values (`torch.Tensor` of shape `(batch, key_value_heads, total, dim)`): keys and values of the whole rows.
        causal (`bool`): whether a token sees the tokens before it only.
        scaling (`float`, *optional*): factor of the logits, by default `head_dim ** -0.5`.
        dropout (`float`): share of the weights to drop.
        sliding_window (`int`, *optional*): number of tokens that a query sees, itself included.

    Returns:
        `torch.Tensor` of shape `(batch, num_heads, length, value_dim)`: the output.
    """
    keys, values = (repeat_heads(x, query.shape[1]) for x in (keys, values))
    mask = None
    if not row.is_plain or sliding_window is not None:
        mask = visible_pairs(row, causal, query.device, sliding_window)
    elif causal:
        # Keys after this part are not seen. A named bias of PyTorch needs no matrix on a GPU
        keys, values = keys[:, :, : row.end], values[:, :, : row.end]
        mask = causal_lower_right(query.shape[2], row.end)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling)
