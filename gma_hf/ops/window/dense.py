# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The softmax of the window over all pairs of tokens, with the standard operators of PyTorch only: for ONNX and for
forward-mode derivatives. The cost is quadratic in the length. The equations of `functional` become one softmax over
everything that a query sees:

    o_i = softmax([s_i, s'_i, m_i, sink]) [V; V'; r_i; 0]

s_i are the logits of the tokens, s'_i the logits of separate sink tokens, m_i the logit of the memory. Queries [B, Hq, N,
d], keys [B, Hk, T, d]; the last N keys belong to the tokens of the queries.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat import is_exporting_to_onnx, is_forward_mode
from ..attention.mixture import repeat_heads
from ..dispatch import Way
from .blocks import all_valid, left_window, memory_logits
from .functional import WAYS, SinkTokens, accumulation_dtype


def dense_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    runs: Tensor | None,
    read: Tensor,
    log_weight: Tensor,
    memory_bias: Tensor,
    memory_query: Tensor,
    weighing_query: Tensor | None,
    sinks: Tensor | None,
    sink_tokens: SinkTokens | None,
    num_sinks: int,
    size: int,
    causal: bool,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The output o. See `window_softmax` for the arguments."""
    dtype, (_, heads, length, _), num_keys = accumulation_dtype(query, value), query.shape, key.shape[2]
    queries = query.to(dtype) * scaling
    keys, values = repeat_heads(key.to(dtype), heads), repeat_heads(value.to(dtype), heads)

    def capped(logits: Tensor) -> Tensor:
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    places = torch.arange(num_keys, device=query.device)
    distance = places[num_keys - length :, None] - places
    visible = ((distance >= 0) & (distance < size) if causal else distance.abs() <= size)[None]
    if num_sinks > 0:
        seen = left_window(num_sinks, length, num_keys, size, query.device)
        visible = visible | F.pad(seen, (0, num_keys - num_sinks))
    visible = visible & all_valid(valid, key)[:, None]
    if runs is not None:
        visible = visible & (runs[:, num_keys - length :, None] == runs[:, None])
    logits = capped(queries @ keys.transpose(-1, -2)).masked_fill(~visible[:, None], float("-inf"))
    parts = [logits]

    sink_values = None
    if sink_tokens is not None:
        # Queries before the last n see none of them
        visible = F.pad(sink_tokens.visible, (0, 0, length - sink_tokens.visible.shape[1], 0))
        sink_keys, sink_values = (
            repeat_heads(x.to(dtype), heads)[:, :, None] for x in (sink_tokens.keys, sink_tokens.values)
        )  # [B, Hq, 1, S, d]
        if sink_tokens.index is not None:
            index = F.pad(sink_tokens.index, (0, 0, length - sink_tokens.index.shape[1], 0))[:, None, :, :, None]
            sink_keys, sink_values = (
                x.expand(-1, -1, length, -1, -1).gather(3, index.expand(-1, heads, -1, -1, x.shape[-1]))
                for x in (sink_keys, sink_values)
            )  # [B, Hq, N, s, d]
        of_sinks = capped((sink_keys * queries[:, :, :, None]).sum(dim=-1))
        parts.append(of_sinks.masked_fill(~visible[:, None], float("-inf")))
    num_sink_tokens = 0 if sink_values is None else sink_values.shape[3]

    weighing_query = query if weighing_query is None else weighing_query
    parts.append(memory_logits(weighing_query, log_weight, memory_bias, memory_query, dtype)[..., None])
    if sinks is not None:
        parts.append(sinks.to(dtype)[:, None, None].expand_as(parts[-1]))
    logits = torch.cat(parts, dim=-1)
    # The lowest number instead of -inf for a query that sees nothing, because a difference to -inf is NaN
    weights = (logits - logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).min)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)

    output = weights.narrow(3, 0, num_keys) @ values
    if sink_values is not None:
        of_sinks = weights.narrow(3, num_keys, num_sink_tokens)
        output = output + (of_sinks[..., None] * sink_values).sum(dim=3)
    read = F.pad(read.to(dtype), (0, 0, length - read.shape[2], 0))
    output = output + weights.narrow(3, num_keys + num_sink_tokens, 1) * read
    return output.to(value.dtype)


WAYS.register(Way("dense", suits=lambda *call: is_exporting_to_onnx() or is_forward_mode(), run=dense_window))
