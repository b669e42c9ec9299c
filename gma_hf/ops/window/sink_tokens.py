# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Sink tokens: the first s tokens of a sequence, which every later query goes on seeing by softmax when they have left its
window (attention sinks, Xiao et al., arXiv:2309.17453). They are merged with what softmax over the others gave:

    l'_i = log(e^{l_i} + sum_j e^{s_ij})           o'_i = e^{l_i - l'_i} o_i + sum_j e^{s_ij - l'_i} v_j

Backwards, a softmax knows of its terms only the output and the normaliser of all. So the gradients of the others are those
that they would have alone, with o' and l' in the place of o and l, and with p_ij = e^{s_ij - l'_i}, delta_i = do_i . o'_i:

    ds_ij = p_ij (do_i . v_j - delta_i)        dq += scaling ds K        dk = scaling ds^T Q        dv = p^T do

B rows, Hq query heads, Hk key/value heads, R = Hq / Hk; the n queries that may see sinks, the last of N.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SinkTokens(NamedTuple):
    """The sink tokens that the last n queries may see, s each."""

    keys: Tensor  # [B, Hk, S, d]
    values: Tensor  # [B, Hk, S, dv]
    visible: Tensor  # [B or 1, n, s], whether a query sees them: they have left its window
    index: Tensor | None = None  # [B, n, s], which of the S are those of a query's sequence; by default all, S = s


def left_window(num_sinks: int, num_queries: int, num_keys: int, size: int, device: torch.device) -> Tensor:
    """Which of the first keys the queries, those of the last keys, see behind a window of `size` tokens, [1, n, s]."""
    places = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    return (places - torch.arange(num_sinks, device=device) >= size)[None]


def take(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `index` [B, n] of x [B, Hk, S, d], [B, Hk, 1, n, d]."""
    index = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).to(dtype)[:, :, None]


def products(y: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """y_i . x_j of queries and their sinks, from [B, Hk, R, n, d] and [B, Hk, S, d]: [B, Hk, R, n, s]."""
    if index is None:
        return torch.einsum("bkrnd,bksd->bkrns", y, x.to(y.dtype))
    return torch.stack([(y * take(x, own, y.dtype)).sum(dim=-1) for own in index.unbind(dim=-1)], dim=-1)


def mixture_of(weights: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """sum_j w_ij x_j, [B, Hk, R, n, d]."""
    if index is None:
        return torch.einsum("bkrns,bksd->bkrnd", weights, x.to(weights.dtype))
    pairs = zip(weights.unbind(dim=-1), index.unbind(dim=-1), strict=True)
    return sum(weight[..., None] * take(x, own, weights.dtype) for weight, own in pairs)


def collected(weights: Tensor, y: Tensor, index: Tensor | None, num_sinks: int) -> Tensor:
    """sum_i w_ij y_i, what all queries have for a sink, [B, Hk, S, d]."""
    if index is None:
        return torch.einsum("bkrns,bkrnd->bksd", weights, y)
    total = y.new_zeros(y.shape[0], num_sinks, y.shape[1], y.shape[-1])
    row = torch.arange(y.shape[0], device=y.device)[:, None]
    for weight, own in zip(weights.unbind(dim=-1), index.unbind(dim=-1), strict=True):
        # Not by atomics: the same call gives the same bits
        total.index_put_((row, own), (weight[..., None] * y).sum(dim=2).transpose(1, 2), accumulate=True)
    return total.transpose(1, 2)


def sink_logits(queries: Tensor, sinks: SinkTokens, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """s, [B, Hk, R, n, s], from scaled queries, -inf where not visible; and ds over what it would be without a cap."""
    logits, slope = products(queries, sinks.keys, sinks.index), 1.0
    if softcap is not None:
        tangent = torch.tanh(logits / softcap)
        logits, slope = softcap * tangent, 1.0 - tangent.square()
    return logits.masked_fill(~sinks.visible[:, None, None], float("-inf")), slope


def grouped(x: Tensor, sinks: SinkTokens) -> Tensor:
    """The last n of [B, Hq, N, ...] as [B, Hk, R, n, ...]."""
    num_queries = sinks.visible.shape[1]
    return x.narrow(2, x.shape[2] - num_queries, num_queries).unflatten(1, (sinks.keys.shape[1], -1))


def attend_sinks(
    output: Tensor, log_sum: Tensor, query: Tensor, sinks: SinkTokens, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """o' [B, Hq, N, dv] and l' [B, Hq, N] from o and l, in their place."""
    dtype = log_sum.dtype
    logits, _ = sink_logits(grouped(query, sinks).to(dtype) * scaling, sinks, softcap)
    log_sums, outputs = grouped(log_sum, sinks), grouped(output, sinks)
    total = torch.logaddexp(log_sums, logits.logsumexp(dim=-1))
    # The lowest number, not -inf, where a query sees nothing: the difference to -inf is no number
    largest = total.clamp(min=torch.finfo(dtype).min)
    others = outputs.to(dtype) * torch.exp(log_sums - largest)[..., None]
    outputs.copy_(others + mixture_of(torch.exp(logits - largest[..., None]), sinks.values, sinks.index))
    log_sums.copy_(total)
    return output, log_sum


def attend_sinks_backward(
    grad_query: Tensor,
    query: Tensor,
    sinks: SinkTokens,
    log_sum: Tensor,
    delta: Tensor,
    grad_output: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """
    dk and dv of the sinks [B, Hk, S, d or dv] in the dtype of l', from l', delta [B, Hq, N] and do; dq is added to
    `grad_query`.
    """
    with torch.autocast(device_type=query.device.type, enabled=False):
        dtype, num_sinks = log_sum.dtype, sinks.keys.shape[2]
        queries, reads = grouped(query, sinks).to(dtype) * scaling, grouped(grad_output, sinks).to(dtype)
        logits, slope = sink_logits(queries, sinks, softcap)
        weights = torch.exp(logits - grouped(log_sum, sinks).clamp(min=torch.finfo(dtype).min)[..., None])
        grad_logits = products(reads, sinks.values, sinks.index) - grouped(delta, sinks)[..., None]
        grad_logits = grad_logits * weights * slope
        grouped(grad_query, sinks).add_(mixture_of(grad_logits, sinks.keys, sinks.index), alpha=scaling)
        grad_keys = collected(grad_logits, queries, sinks.index, num_sinks)
        grad_values = collected(weights, reads, sinks.index, num_sinks)
        return grad_keys, grad_values
