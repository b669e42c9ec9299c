# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The public functions of the window: softmax attention to the nearest tokens and to the read of a memory, in linear time and
memory.

    o_i = (sum_{j near i} e^{s_ij} v_j + e^{m_i} r_i) / e^{l_i}     s_ij = scaling q_i . k_j, or c tanh(s / c) of that
    l_i = log(sum_{j near i} e^{s_ij} + e^{m_i} + e^{sink})         m_i = a + u . q'_i + log D_i

The memory acts as one more token. Its value r_i is the read, a mean of values, and D_i is the weight of this mean. q' weighs
the memory; it is q unless the call has other queries. Sink tokens are among the near tokens: they have their own keys and
values, or they are the first keys of the call after they have left the window.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...compat import can_use_flash_on_cpu, flash_attention_on_cpu
from ..dispatch import Ways


# "dense" computes all pairs of tokens with standard operators; "operators" are custom operators in linear time. Each
# registers itself
WAYS = Ways("window", ("dense", "operators"))
# As in the operator, weights below 1e-19 count as zero, and the inverse of 1e-19 is finite. It is added to the weight of a
# memory, so a weight below twice this number means an empty memory
EMPTY = torch.finfo(torch.float32).tiny ** 0.5
LOG_NOTHING = math.log(2 * EMPTY)


class SinkTokens(NamedTuple):
    """The sink tokens that the last n queries may see, s per query."""

    keys: Tensor  # [B, Hk, S, d]
    values: Tensor  # [B, Hk, S, dv]
    visible: Tensor  # [B or 1, n, s], whether a query sees them: they have left its window
    index: Tensor | None = None  # [B, n, s], which of the S are those of a query's sequence; by default all, S = s


def accumulation_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """Precision of logits and sums: float32, or float64 if an input is float64."""
    return torch.float64 if torch.float64 in (query.dtype, value.dtype) else torch.float32


def window_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    runs: Tensor | None,
    read: Tensor,
    log_weight: Tensor,
    memory_bias: Tensor,
    memory_query: Tensor,
    weighing_query: Tensor | None = None,
    sinks: Tensor | None = None,
    sink_tokens: SinkTokens | None = None,
    *,
    num_sinks: int = 0,
    size: int,
    causal: bool,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """
    Attention of every query to the valid near tokens of its own run (itself and the `size` - 1 tokens before it, or `size`
    tokens to each side), and to its read of a memory. The equations stand at the top of this file.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): queries of the last `length` tokens.
        key (`torch.Tensor` of shape `(batch, key_value_heads, num_keys, head_dim)`): keys of the same `length` tokens; in
            causal calls optionally also of the `size` tokens before them.
        value (`torch.Tensor` of shape `(batch, key_value_heads, num_keys, value_dim)`): values of the same tokens as the
            keys.
        valid (`torch.BoolTensor` of shape `(batch or 1, num_keys)`, *optional*): which tokens may be seen; by default all.
        runs (`torch.LongTensor` of shape `(batch, num_keys)`, *optional*): tokens of different runs do not see each other.
        read (`torch.Tensor` of shape `(batch, heads, asked, value_dim)`): r of the last `asked` queries, at most `length`.
            The other queries have no memory.
        log_weight (`torch.Tensor` of shape `(batch, heads, asked)`): log D. Values below log 2e-19 mean an empty memory.
        memory_bias (`torch.Tensor` of shape `(heads,)`): a, for the weight of the memory.
        memory_query (`torch.Tensor` of shape `(heads, head_dim)`): u, for the weight of the memory.
        weighing_query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`, *optional*): q', which is multiplied with
            u; by default `query`.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): logits that join the normaliser only.
        sink_tokens (`SinkTokens`, *optional*): further visible tokens from before the window.
        num_sinks (`int`): how many of the first keys stay visible when they have left the window of a query, instead of
            `sink_tokens`.
        size (`int`): W.
        causal (`bool`): whether a query sees the tokens before it only.
        scaling (`float`): factor of the logits.
        softcap (`float`, *optional*): c: logits s become c tanh(s / c).

    Returns:
        `torch.Tensor` of shape `(batch, heads, length, value_dim)`: the output, in the dtype of `value`; 0 for a query that
        sees nothing.

    Raises:
        ValueError: if `weighing_query` has other heads or another dimension than `memory_query`.
    """
    if weighing_query is not None and weighing_query.shape[1::2] != memory_query.shape:
        raise ValueError(
            f"The queries that weigh the memory have {weighing_query.shape[1]} heads of dimension "
            f"{weighing_query.shape[3]}, but `memory_query` has shape {list(memory_query.shape)}. Give it vectors of the same "
            "heads and dimension."
        )
    arguments = (
        query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sinks, sink_tokens,
        num_sinks, size, causal, scaling, softcap,
    )  # fmt: skip
    return WAYS.choose(*arguments).run(*arguments)


def attend_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    read: Tensor,
    memory_logit: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """
    `window_softmax` for one query per row, with as few operations as possible, for decoding.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, 1, head_dim)`): the query.
        keys (`torch.Tensor` of shape `(batch, key_value_heads, num_keys, head_dim)`): all visible keys, sink tokens
            included.
        values (`torch.Tensor` of shape `(batch, key_value_heads, num_keys, value_dim)`): their values.
        valid (`torch.BoolTensor` of shape `(batch, num_keys)`, *optional*): which of them exist; by default all.
        read (`torch.Tensor` of shape `(batch, heads, 1, value_dim)`): r.
        memory_logit (`torch.Tensor` of shape `(batch, heads, 1)`): m + log D.
        scaling, softcap, sinks: see [`window_softmax`].

    Returns:
        `torch.Tensor` of shape `(batch, heads, 1, value_dim)`: the output, in the dtype of `values`.
    """
    dtype = accumulation_dtype(query, values)
    batch_size, num_heads, (num_key_heads, num_keys) = *query.shape[:2], keys.shape[1:3]
    if softcap is None and valid is None and sinks is None and can_use_flash_on_cpu(query, keys, values):
        if num_heads > num_key_heads:
            query, read = (x.view(batch_size, num_key_heads, -1, x.shape[3]) for x in (query, read))
            memory_logit = memory_logit.view(batch_size, num_key_heads, -1)
        near, log_sum = flash_attention_on_cpu(query, keys, values, scaling)
        # The share of the memory in the softmax over near tokens and memory
        share = torch.sigmoid(memory_logit - log_sum).unsqueeze(-1)
        output = torch.lerp(near, read, share)
        return output if num_heads == num_key_heads else output.view(batch_size, num_heads, 1, -1)
    # Queries that share a key are rows of one matrix
    rows = (batch_size * num_key_heads, num_heads // num_key_heads)
    memory_logit = memory_logit.view(*rows, 1)
    transposed = keys.to(dtype).flatten(0, 1).transpose(1, 2)
    logits = torch.baddbmm(memory_logit, query.to(dtype).reshape(*rows, -1), transposed, beta=0, alpha=scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if valid is not None:
        is_hidden = ~valid[:, None].expand(-1, num_key_heads, -1).reshape(-1, 1, num_keys)
        logits = logits.masked_fill(is_hidden, float("-inf"))
    logits = [logits, memory_logit]
    if sinks is not None:
        logits.append(sinks.to(dtype).view(num_key_heads, -1, 1).repeat(batch_size, 1, 1))
    weights = torch.cat(logits, dim=-1).softmax(dim=-1)
    near = torch.bmm(weights.narrow(2, 0, num_keys), values.to(dtype).flatten(0, 1))
    output = torch.addcmul(near, weights.narrow(2, num_keys, 1), read.to(dtype).reshape(*rows, -1))
    return output.view(batch_size, num_heads, 1, -1).to(values.dtype)
