# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
`window_softmax` in PyTorch, in any precision and on any device: its two passes and the sink tokens.

A block of T queries needs the T keys at the same places and the W keys before them (bidirectional, also the W keys after
them), so there are T + W logits per query. B rows, Hq query heads, Hk key/value heads, R = Hq / Hk, length N, n blocks:
queries [B, Hk, n, R * T, d] (queries that share a key are rows of one matrix), keys of a block [B, Hk, n, span, d].

Sink tokens are the first s tokens of a sequence. Every later query still sees them by softmax when they have left its window
(attention sinks, Xiao et al., arXiv:2309.17453). They are merged with the result of softmax over the other tokens:

    l'_i = log(e^{l_i} + sum_j e^{s_ij})           o'_i = e^{l_i - l'_i} o_i + sum_j e^{s_ij - l'_i} v_j

The backward pass of a softmax needs only the output and the normaliser of all terms. So the gradients of the other tokens
are the same as alone, with o' and l' instead of o and l. With p_ij = e^{s_ij - l'_i}, delta_i = do_i . o'_i:

    ds_ij = p_ij (do_i . v_j - delta_i)        dq += scaling ds K        dk = scaling ds^T Q        dv = p^T do

B rows, Hq query heads, Hk key/value heads, R = Hq / Hk; the n queries that may see sink tokens are the last of N.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import LOG_NOTHING, SinkTokens, accumulation_dtype


SHORTEST_BLOCK = 16  # queries: narrow windows would make the matrix products small
PIECE = 2**24  # logits that exist at the same time


class Band(NamedTuple):
    """The blocks of the tokens."""

    size: int  # W
    causal: bool
    lead: int  # keys before that of the first query: 0 or W
    block: int  # T
    num_blocks: int

    @property
    def span(self) -> int:
        """Number of keys for a block of queries."""
        return self.block + self.size * (1 if self.causal else 2)

    @property
    def padding(self) -> int:
        """Number of keys for the first query that do not exist."""
        return self.size - self.lead

    def spread(self, x: Tensor, dim: int) -> Tensor:
        """Keys of all blocks, [..., length, ...] -> [..., n, ..., span] (overlapping views)."""
        missing = self.span + (self.num_blocks - 1) * self.block - x.shape[dim] - self.padding
        return F.pad(x, (*[0, 0] * (x.ndim - 1 - dim), self.padding, missing)).unfold(dim, self.span, self.block)

    def gather(self, x: Tensor, length: int) -> Tensor:
        """
        The transpose of `spread`: the sum of the values of all blocks [B, Hk, n, span, d] for a key, [B, Hk, length, d].
        """
        size, block = self.size, self.block
        total = x.new_zeros(*x.shape[:2], (self.num_blocks + 1) * block + size, x.shape[-1])
        for start, width in ((0, size), (size, block), (size + block, size))[: 2 if self.causal else 3]:
            part = total.narrow(2, start, self.num_blocks * block).unflatten(2, (self.num_blocks, block))
            part.narrow(3, 0, width).add_(x.narrow(3, start, width))
        return total.narrow(2, self.padding, length).clone(memory_format=torch.contiguous_format)

    def pieces(self, num_rows: int) -> list[slice]:
        """Groups of blocks to compute at once. `num_rows` is the number of rows of logits of one block."""
        step = max(1, PIECE // max(1, num_rows * self.span))
        return [slice(start, start + step) for start in range(0, self.num_blocks, step)]

    def fold_queries(self, x: Tensor, num_key_heads: int) -> Tensor:
        """[B, Hq, N, d] -> [B, Hk, n, R * T, d]."""
        x = F.pad(x, (0, 0, 0, self.num_blocks * self.block - x.shape[2]))
        x = x.unflatten(2, (self.num_blocks, self.block)).unflatten(1, (num_key_heads, -1))
        return x.transpose(2, 3).flatten(3, 4)

    def unfold_queries(self, x: Tensor, length: int) -> Tensor:
        """[B, Hk, n, R * T, d] -> [B, Hq, N, d]."""
        x = x.unflatten(3, (-1, self.block)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        return x.narrow(2, 0, length).contiguous()

    def visible(self, valid: Tensor, runs: Tensor | None) -> Tensor:
        """Which keys a query sees, [B or 1, n, T, span]."""
        key_place = torch.arange(self.span, device=valid.device) - self.size
        distance = torch.arange(self.block, device=valid.device)[:, None] - key_place
        is_near = (distance >= 0) & (distance < self.size) if self.causal else distance.abs() <= self.size
        visible = self.spread(valid, 1)[:, :, None] & is_near
        if runs is not None:
            key_runs = self.spread(runs, 1)
            visible = visible & (key_runs[..., self.size : self.size + self.block, None] == key_runs[:, :, None])
        return visible


def shortest_band(length: int, size: int, causal: bool, lead: int) -> Band:
    """The band of a forward pass: a single token is one block."""
    block = max(1, min(length, max(size, SHORTEST_BLOCK)))
    return Band(size, causal, lead, block, max(1, -(-length // block)))


def whole_band(length: int, size: int, causal: bool, lead: int) -> Band:
    """The band of a backward pass: `gather` needs blocks that are at least as long as the window."""
    block = max(size, SHORTEST_BLOCK)
    return Band(size, causal, lead, block, max(1, -(-length // block)))


def masked_logits(query: Tensor, key: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """
    s, [B, Hk, n, R * T, span], from scaled queries and the keys [B, Hk, n, d, span]; -inf for pairs that are not visible.
    """
    logits = query @ key
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    logits.unflatten(3, (-1, visible.shape[2])).masked_fill_(~visible[:, None, :, None], float("-inf"))
    return logits


def memory_logits(query: Tensor, log_weight: Tensor, memory_bias: Tensor, memory_query: Tensor, dtype) -> Tensor:
    """m + log D, [B, Hq, N], from the queries that weigh the memory; -inf if the memory is empty or the query has none."""
    log_weight = F.pad(log_weight.to(dtype), (query.shape[2] - log_weight.shape[2], 0), value=float("-inf"))
    slopes = query.to(dtype) @ memory_query.to(dtype)[:, :, None]
    logits = slopes.squeeze(-1) + memory_bias.to(dtype)[:, None] + log_weight
    return logits.masked_fill_(log_weight < LOG_NOTHING, float("-inf"))


def all_valid(valid: Tensor | None, key: Tensor) -> Tensor:
    """`valid`, or a mask with all keys."""
    return torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device) if valid is None else valid


def attend(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sinks,
    size, causal, scaling, softcap,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, Hq, N, dv] and l [B, Hq, N]."""
    dtype, length = accumulation_dtype(query, value), query.shape[2]
    band = shortest_band(length, size, causal, key.shape[2] - length)
    queries = band.fold_queries(query.to(dtype) * scaling, key.shape[1])
    keys, values = band.spread(key.to(dtype), 2), band.spread(value.to(dtype), 2)
    visible = band.visible(all_valid(valid, key), runs)
    near = queries.new_empty(*queries.shape[:-1], value.shape[-1])
    log_sum = queries.new_empty(*queries.shape[:-1], 1)
    # The lowest number instead of -inf for a query that sees nothing, because a difference to -inf is NaN
    lowest = torch.finfo(dtype).min
    for piece in band.pieces(queries[:, :, 0, :, 0].numel()):
        weights = masked_logits(queries[:, :, piece], keys[:, :, piece], visible[:, piece], softcap)
        maximum = weights.amax(dim=-1, keepdim=True).clamp_(min=lowest)
        total = weights.sub_(maximum).exp_().sum(dim=-1, keepdim=True)
        log_sum[:, :, piece] = maximum.add_(total.log())
        near_sum = weights @ values[:, :, piece].transpose(-1, -2)
        near[:, :, piece] = near_sum.div_(total.masked_fill_(total == 0, 1.0))
    near, log_sum = band.unfold_queries(near, length), band.unfold_queries(log_sum, length).squeeze(-1)

    weighing_query = query if weighing_query is None else weighing_query
    logits = memory_logits(weighing_query, log_weight, memory_bias, memory_query, dtype)
    maximum = torch.maximum(log_sum, logits)
    if sinks is not None:
        sinks = sinks.to(dtype)[:, None]
        maximum = torch.maximum(maximum, sinks)
    maximum.clamp_(min=lowest)
    near_factor, memory_factor = torch.exp(log_sum - maximum), torch.exp(logits - maximum)
    total = near_factor + memory_factor
    if sinks is not None:
        total += torch.exp(sinks - maximum)
    output, asked = near.mul_(near_factor[..., None]), slice(length - read.shape[2], None)
    output[:, :, asked].addcmul_(read.to(dtype), memory_factor[:, :, asked, None])
    # The largest term is about one, so the sum is zero only if nothing is seen
    output.div_(total.masked_fill(total == 0, 1.0)[..., None])
    return output.to(value.dtype), maximum.add_(total.log())


def attend_backward(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query,
    output, log_sum, grad_output, size, causal, scaling, softcap,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, dr, dm [B, Hq, N], du [Hq, d], delta [B, Hq, N] and the gradient of `weighing_query`, of size 0 if None."""
    dtype, length, num_key_heads = log_sum.dtype, query.shape[2], key.shape[1]
    grad_output, asked = grad_output.to(dtype), slice(length - read.shape[2], None)
    delta = (grad_output * output).sum(dim=-1)
    log_sum = log_sum.clamp(min=torch.finfo(dtype).min)
    weighing = query if weighing_query is None else weighing_query
    factor = torch.exp(memory_logits(weighing, log_weight, memory_bias, memory_query, dtype) - log_sum)
    grad_read, grad_logit = grad_output[:, :, asked] * factor[:, :, asked, None], -factor * delta
    grad_logit[:, :, asked] += (read * grad_read).sum(dim=-1)
    grad_memory_query = (weighing.to(dtype) * grad_logit[..., None]).sum(dim=(0, 2))

    band = whole_band(length, size, causal, key.shape[2] - length)
    queries = band.fold_queries(query.to(dtype) * scaling, num_key_heads)
    keys, values = band.spread(key.to(dtype), 2), band.spread(value.to(dtype), 2)
    visible = band.visible(all_valid(valid, key), runs)
    reads = band.fold_queries(grad_output, num_key_heads)
    deltas, log_sum = (band.fold_queries(x[..., None], num_key_heads) for x in (delta, log_sum))
    grad_query = torch.empty_like(queries)
    grad_key = queries.new_empty(*queries.shape[:3], band.span, key.shape[-1])
    grad_value = queries.new_empty(*queries.shape[:3], band.span, value.shape[-1])
    for piece in band.pieces(queries[:, :, 0, :, 0].numel()):
        logits = masked_logits(queries[:, :, piece], keys[:, :, piece], visible[:, piece], softcap)
        weights = torch.exp(logits - log_sum[:, :, piece])
        grad_value[:, :, piece] = weights.transpose(-1, -2) @ reads[:, :, piece]
        grad_logits = reads[:, :, piece] @ values[:, :, piece]
        grad_logits.sub_(deltas[:, :, piece]).mul_(weights)
        if softcap is not None:
            # d (c tanh(s / c)) = 1 - tanh^2; what is not visible has weight zero, but an infinite logit
            slope = logits.div_(softcap).square_().neg_().add_(1.0)
            grad_logits.mul_(slope.masked_fill_(weights == 0, 0.0))
        grad_query[:, :, piece] = grad_logits @ keys[:, :, piece].transpose(-1, -2)
        grad_key[:, :, piece] = grad_logits.transpose(-1, -2) @ queries[:, :, piece]
    grad_query = band.unfold_queries(grad_query, length).mul_(scaling)
    grad_weighing = grad_logit[..., None] * memory_query.to(dtype)[:, None]
    if weighing_query is None:
        grad_query.add_(grad_weighing)
        grad_weighing = log_sum.new_empty(0)
    else:
        grad_weighing = grad_weighing.to(weighing_query.dtype)
    grads = (grad_query, *(band.gather(x, key.shape[2]) for x in (grad_key, grad_value)), grad_read)
    grads = (grad.to(x.dtype) for grad, x in zip(grads, (query, key, value, read), strict=True))
    return tuple(x.contiguous() for x in (*grads, grad_logit, grad_memory_query, delta, grad_weighing))


def left_window(num_sinks: int, num_queries: int, num_keys: int, size: int, device: torch.device) -> Tensor:
    """Which of the first keys the queries of the last keys see after a window of `size` tokens, [1, n, s]."""
    places = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    return (places - torch.arange(num_sinks, device=device) >= size)[None]


def take_rows(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `index` [B, n] of x [B, Hk, S, d], [B, Hk, 1, n, d]."""
    index = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).to(dtype)[:, :, None]


def products(y: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """y_i . x_j of queries and their sink tokens, from [B, Hk, R, n, d] and [B, Hk, S, d]: [B, Hk, R, n, s]."""
    if index is None:
        return torch.einsum("bkrnd,bksd->bkrns", y, x.to(y.dtype))
    return torch.stack([(y * take_rows(x, own, y.dtype)).sum(dim=-1) for own in index.unbind(dim=-1)], dim=-1)


def mixture_of(weights: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """sum_j w_ij x_j, [B, Hk, R, n, d]."""
    if index is None:
        return torch.einsum("bkrns,bksd->bkrnd", weights, x.to(weights.dtype))
    pairs = zip(weights.unbind(dim=-1), index.unbind(dim=-1), strict=True)
    return sum(weight[..., None] * take_rows(x, own, weights.dtype) for weight, own in pairs)


def collected(weights: Tensor, y: Tensor, index: Tensor | None, num_sinks: int) -> Tensor:
    """sum_i w_ij y_i, the sum of all queries for a sink token, [B, Hk, S, d]."""
    if index is None:
        return torch.einsum("bkrns,bkrnd->bksd", weights, y)
    total = y.new_zeros(y.shape[0], num_sinks, y.shape[1], y.shape[-1])
    row = torch.arange(y.shape[0], device=y.device)[:, None]
    for weight, own in zip(weights.unbind(dim=-1), index.unbind(dim=-1), strict=True):
        # Without atomics, so that the same call gives the same bits
        total.index_put_((row, own), (weight[..., None] * y).sum(dim=2).transpose(1, 2), accumulate=True)
    return total.transpose(1, 2)


def sink_logits(queries: Tensor, sinks: SinkTokens, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """
    s, [B, Hk, R, n, s], from scaled queries, -inf for pairs that are not visible; and the factor of ds that the soft cap
    adds.
    """
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
    """o' [B, Hq, N, dv] and l' [B, Hq, N] from o and l, in the same memory."""
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
    dk and dv of the sink tokens [B, Hk, S, d or dv] in the dtype of l', from l', delta [B, Hq, N] and do. dq is added to
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
