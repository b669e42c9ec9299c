# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention to the nearest tokens, in linear time and memory.

    o_i = sum_{j near i} e^{s_ij - l_i} v_j,      l_i = log sum_{j near i} e^{s_ij},      s_ij = scaling q_i . k_j

or c tanh(s / c) for s. A block of T queries stands against the T keys beside it and the W before (bidirectional, also the
W behind) them, so there are T + W logits per query. Backwards, with p_ij = e^{s_ij - l_i}:

    ds_ij = p_ij (do_i . v_j - do_i . o_i + dl_i)         dq = scaling ds K        dk = scaling ds^T Q        dv = p^T do

Only the inputs, o and l are kept; logits are computed again. B rows, Hq query heads, Hk key/value heads, R = Hq / Hk,
length N, n blocks: queries [B, Hk, n, R * T, d] (queries that share a key are rows of one matrix), keys of a block
[B, Hk, n, span, d].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


SHORTEST_BLOCK = 16  # queries: narrow windows would make the matrix products small
PIECE = 2**24  # logits that exist at the same time


class Band(NamedTuple):
    """How the tokens are cut into blocks."""

    size: int  # W
    causal: bool
    block: int  # T
    num_blocks: int

    @property
    def span(self) -> int:
        """How many keys a block of queries stands against."""
        return self.block + self.size * (1 if self.causal else 2)

    def spread(self, x: Tensor, dim: int) -> Tensor:
        """Keys of all blocks, [..., length, ...] -> [..., n, ..., span] (overlapping views)."""
        padding = self.size * (0 if self.causal else 1)
        missing = self.size * (1 if self.causal else 2) + self.num_blocks * self.block - x.shape[dim] - padding
        return F.pad(x, (*[0, 0] * (x.ndim - 1 - dim), padding, missing)).unfold(dim, self.span, self.block)

    def gather(self, x: Tensor, length: int) -> Tensor:
        """The transpose of `spread`: sums what blocks [B, Hk, n, span, d] have for a key, [B, Hk, length, d]."""
        size, block = self.size, self.block
        total = x.new_zeros(*x.shape[:2], (self.num_blocks + 1) * block + size, x.shape[-1])
        for start, width in ((0, size), (size, block), (size + block, size))[: 2 if self.causal else 3]:
            part = total.narrow(2, start, self.num_blocks * block).unflatten(2, (self.num_blocks, block))
            part.narrow(3, 0, width).add_(x.narrow(3, start, width))
        return total.narrow(2, 0 if self.causal else size, length).contiguous()

    def pieces(self, num_rows: int) -> list[slice]:
        """Blocks to do at once, `num_rows` being those of the logits of one block."""
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


def shortest_band(length: int, size: int, causal: bool) -> Band:
    """The band of a forward pass: a single token is a block of its own."""
    block = max(1, min(length, max(size, SHORTEST_BLOCK)))
    return Band(size, causal, block, max(1, -(-length // block)))


def whole_band(length: int, size: int, causal: bool) -> Band:
    """The band of a backward pass: `gather` needs blocks that are no shorter than the window."""
    block = max(size, SHORTEST_BLOCK)
    return Band(size, causal, block, max(1, -(-length // block)))


def masked_logits(query: Tensor, key: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """s, [B, Hk, n, R * T, span], from scaled queries and the keys [B, Hk, n, d, span]; -inf where not visible."""
    logits = query @ key
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    logits.unflatten(3, (-1, visible.shape[2])).masked_fill_(~visible[:, None, :, None], float("-inf"))
    return logits


# As in `ops`, the two passes are opaque operators to torch.compile and torch.export, and lengths stay dynamic.


@torch.library.custom_op(
    "gma_hf::window_softmax",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor valid, Tensor? runs, int size, bool causal, float scaling, "
    "float? softcap) -> (Tensor, Tensor)",
)
def softmax_forward(query, key, value, valid, runs, size, causal, scaling, softcap):
    """o [B, Hq, N, dv] and l [B, Hq, N, 1]."""
    dtype = accumulation_dtype(query, value)
    band = shortest_band(query.shape[2], size, causal)
    queries = band.fold_queries(query.to(dtype) * scaling, key.shape[1])
    keys, values = band.spread(key.to(dtype), 2), band.spread(value.to(dtype), 2)
    visible = band.visible(valid, runs)
    output = queries.new_empty(*queries.shape[:-1], value.shape[-1])
    log_sum = queries.new_empty(*queries.shape[:-1], 1)
    for piece in band.pieces(queries[:, :, 0, :, 0].numel()):
        weights = masked_logits(queries[:, :, piece], keys[:, :, piece], visible[:, piece], softcap)
        # The lowest number, not -inf, where a query sees nothing: the difference to -inf is no number
        maximum = weights.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        total = weights.sub_(maximum).exp_().sum(dim=-1, keepdim=True)
        log_sum[:, :, piece] = maximum.add_(total.log())
        read = weights @ values[:, :, piece].transpose(-1, -2)
        output[:, :, piece] = read.div_(total.masked_fill_(total == 0, 1.0))
    return band.unfold_queries(output, query.shape[2]), band.unfold_queries(log_sum, query.shape[2])


@softmax_forward.register_fake
def _(query, key, value, valid, runs, size, causal, scaling, softcap):
    dtype = accumulation_dtype(query, value)
    output = query.new_empty(*query.shape[:3], value.shape[-1], dtype=dtype)
    return output, query.new_empty(*query.shape[:3], 1, dtype=dtype)


@torch.library.custom_op(
    "gma_hf::window_softmax_backward",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor valid, Tensor? runs, Tensor output, Tensor log_sum, "
    "Tensor grad_output, Tensor grad_log_sum, int size, bool causal, float scaling, float? softcap) "
    "-> (Tensor, Tensor, Tensor)",
)
def softmax_backward(
    query, key, value, valid, runs, output, log_sum, grad_output, grad_log_sum, size, causal, scaling, softcap
):
    """Gradients of query, key and value."""
    dtype, length, num_key_heads = output.dtype, query.shape[2], key.shape[1]
    band = whole_band(length, size, causal)
    queries = band.fold_queries(query.to(dtype) * scaling, num_key_heads)
    keys, values = band.spread(key.to(dtype), 2), band.spread(value.to(dtype), 2)
    visible = band.visible(valid, runs)
    reads = band.fold_queries(grad_output.to(dtype), num_key_heads)
    offsets = grad_log_sum.to(dtype) - (grad_output * output).sum(dim=-1, keepdim=True)
    offsets = band.fold_queries(offsets, num_key_heads)
    log_sum = band.fold_queries(log_sum.clamp(min=torch.finfo(dtype).min), num_key_heads)

    grad_query = torch.empty_like(queries)
    grad_key = queries.new_empty(*queries.shape[:3], band.span, key.shape[-1])
    grad_value = queries.new_empty(*queries.shape[:3], band.span, value.shape[-1])
    for piece in band.pieces(queries[:, :, 0, :, 0].numel()):
        logits = masked_logits(queries[:, :, piece], keys[:, :, piece], visible[:, piece], softcap)
        weights = torch.exp(logits - log_sum[:, :, piece])
        grad_value[:, :, piece] = weights.transpose(-1, -2) @ reads[:, :, piece]
        grad_logits = reads[:, :, piece] @ values[:, :, piece]
        grad_logits.add_(offsets[:, :, piece]).mul_(weights)
        if softcap is not None:
            # d (c tanh(s / c)) = 1 - tanh^2; what is not visible has weight zero, but an infinite logit
            slope = logits.div_(softcap).square_().neg_().add_(1.0)
            grad_logits.mul_(slope.masked_fill_(weights == 0, 0.0))
        grad_query[:, :, piece] = grad_logits @ keys[:, :, piece].transpose(-1, -2)
        grad_key[:, :, piece] = grad_logits.transpose(-1, -2) @ queries[:, :, piece]
    grads = (
        band.unfold_queries(grad_query, length).mul_(scaling),
        band.gather(grad_key, key.shape[2]),
        band.gather(grad_value, key.shape[2]),
    )
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))


@softmax_backward.register_fake
def _(query, key, value, valid, runs, output, log_sum, grad_output, grad_log_sum, size, causal, scaling, softcap):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


class BandSoftmax(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(ctx, query, key, value, valid, runs, *arguments):
        output, log_sum = softmax_forward(query, key, value, valid, runs, *arguments)
        ctx.save_for_backward(query, key, value, valid, runs, output, log_sum)
        ctx.arguments = arguments
        return output, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_log_sum):
        grads = softmax_backward(*ctx.saved_tensors, grad_output, grad_log_sum, *ctx.arguments)
        return *grads, *[None] * 6


def accumulation_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """Precision of logits and sums: float32, or float64 when an input has it."""
    return torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)


def window_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    runs: Tensor | None = None,
    *,
    size: int,
    causal: bool,
    scaling: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Softmax attention of every query to the near tokens that are valid and of its own run: itself and the `size` - 1 before
    it, or `size` to each side.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): the last `length` tokens.
        key (`torch.Tensor` of shape `(batch, key_value_heads, size + length, head_dim)`): `length` keys if not causal.
        value (`torch.Tensor` of shape `(batch, key_value_heads, size + length, value_dim)`): likewise.
        valid (`torch.BoolTensor` of shape `(batch or 1, size + length)`): which tokens may be seen.
        runs (`torch.LongTensor` of shape `(batch, size + length)`, *optional*): tokens of different runs are apart.
        size (`int`): W.
        causal (`bool`): look back only.
        scaling (`float`): factor of the logits.
        softcap (`float`, *optional*): c, where logits become c tanh(s / c).

    Returns:
        `tuple(torch.Tensor)`: the outputs `(batch, heads, length, value_dim)` and the logarithms of their normalisers
        `(batch, heads, length)`, in float32 (float64 when an input is float64); 0 and -inf where a query sees no token.
    """
    output, log_sum = BandSoftmax.apply(query, key, value, valid, runs, size, causal, scaling, softcap)
    return output, log_sum.squeeze(-1)
