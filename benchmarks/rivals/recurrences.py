# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The recurrences of the rivals, computed in chunks by matrix products, and what their blocks share.

    linear attention    o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)        j <= i if causal
    Mamba-2             S_t = exp(-A dt_t) S_{t-1} + dt_t B_t x_t^T,    y_t = C_t S_t      (arXiv:2405.21060, section 6)

On a GPU with flash-linear-attention the decayed recurrence is computed by its kernel `chunk_simple_gla`; everywhere else by plain
PyTorch. `program()` says which, and every row of a training keeps it.
"""

import functools
import importlib.util
import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import is_tracing

from gma_hf.modeling.layout import Layout


CHUNK_SIZE = 128
BLOCK_SIZE = 64  # chunks whose states are combined by one matrix; more chunks are combined block by block
PLAIN, FLA = "plain PyTorch", "flash-linear-attention"


@functools.cache
def program() -> str:
    """What computes the decayed recurrence on this machine."""
    return FLA if torch.cuda.is_available() and importlib.util.find_spec("fla") else PLAIN


def linear_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = True, eps: float = 1e-6) -> Tensor:
    """
    The normalised read above of features `[batch, heads, length, features]`, not negative, and zero where a key is padding; `eps`
    is added to the normaliser. Products in the dtype of `value`, sums over tokens in float32 at least.
    """
    dtype, length = value.dtype, value.shape[2]
    accumulator = torch.promote_types(dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)

    def product(query: Tensor, normaliser: Tensor) -> Tensor:
        return (query.to(accumulator) * normaliser).sum(dim=-1, keepdim=True)

    def before(x: Tensor) -> Tensor:  # the sum over the chunks before each
        return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1].cumsum(dim=2)

    with torch.autocast(value.device.type, enabled=False):
        if not causal:
            denominator = product(query, key.to(accumulator).sum(dim=-2, keepdim=True))
            return ((query @ (key.transpose(-1, -2) @ value)).to(accumulator) / (denominator + eps)).to(dtype)
        # Zero keys at the end write nothing
        query, key, value = (
            F.pad(x, (0, 0, 0, -length % CHUNK_SIZE)).unflatten(2, (-1, CHUNK_SIZE)) for x in (query, key, value)
        )
        # Within a chunk by the matrix of scores, from earlier chunks by their state
        scores = (query @ key.transpose(-1, -2)).tril()
        state = before((key.transpose(-1, -2) @ value).to(accumulator))
        numerator = (scores @ value).to(accumulator) + (query @ state.to(dtype)).to(accumulator)
        denominator = scores.to(accumulator).sum(dim=-1, keepdim=True)
        denominator = denominator + product(query, before(key.to(accumulator).sum(dim=-2, keepdim=True)))
        return (numerator / (denominator + eps)).to(dtype).flatten(2, 3)[:, :, :length]


def state_space(x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, by: str | None = None) -> Tensor:
    """
    The recurrence of Mamba-2: y of x `[batch, length, heads, dim]`, with steps dt `[batch, length, heads]`, zero at padding, rates
    A `[heads]`, and B, C `[batch, length, state]`, shared by all heads. `by` is `PLAIN` or `FLA`, by default what `program` says.
    """
    dt = dt.to(torch.promote_types(x.dtype, torch.float32))
    return decayed_attention(C, B, (x.to(dt.dtype) * dt[..., None]).to(x.dtype), -rate.to(dt.dtype) * dt, by)


def decayed_attention(C: Tensor, B: Tensor, x: Tensor, log_decay: Tensor, by: str | None = None) -> Tensor:
    """
    y_t = C_t S_t with S_t = exp(log_decay_t) S_{t-1} + B_t x_t^T. Products in the dtype of `x`, decays and states in float32 at
    least; shapes as in `state_space`, `log_decay` like dt.
    """
    dtype, (length, heads) = x.dtype, x.shape[1:3]
    accumulator = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        log_decay, B, C = log_decay.to(accumulator), B.to(dtype), C.to(dtype)
        if (by or (program() if x.is_cuda else PLAIN)) == FLA:
            from fla.ops.simple_gla import chunk_simple_gla

            query, key = (part[:, :, None].expand(-1, -1, heads, -1) for part in (C, B))
            return chunk_simple_gla(query, key, x, g=log_decay, scale=1.0)[0]
        # Zero inputs at the end neither write nor decay
        padding = -length % CHUNK_SIZE
        x = F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, CHUNK_SIZE))
        log_decay, B, C = (
            F.pad(part, (0, 0, 0, padding)).unflatten(1, (-1, CHUNK_SIZE)) for part in (log_decay, B, C)
        )
        decayed = log_decay.cumsum(dim=2)  # from the start of the chunk to and with each token

        # Within a chunk: token i reads what token j <= i wrote, decayed since
        by_head = decayed.transpose(2, 3)  # [batch, chunks, heads, chunk size]
        is_past = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool, device=x.device).tril()
        decay = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(~is_past, -math.inf).exp()
        scores = (C @ B.transpose(-1, -2))[:, :, None].to(accumulator) * decay
        output = (scores.to(dtype) @ x.transpose(2, 3)).transpose(2, 3)

        # From earlier chunks: what each leaves behind, and what has come together before each
        to_end = (decayed[:, :, -1:] - decayed).exp()
        written = (x.to(accumulator) * to_end[..., None]).to(dtype).flatten(3)
        states = (B.transpose(-1, -2) @ written).to(accumulator).unflatten(-1, (heads, -1))
        states = states_before(states.transpose(2, 3).flatten(3), decayed[:, :, -1])
        states = states.unflatten(-1, (C.shape[-1], -1)).transpose(2, 3).flatten(3)
        earlier = (C @ states.to(dtype)).unflatten(-1, (heads, -1)).to(accumulator) * decayed.exp()[..., None]
        return (output.to(accumulator) + earlier).to(dtype).flatten(1, 2)[:, :length]


def states_before(states: Tensor, log_decay: Tensor) -> Tensor:
    """
    The sum over chunks z < c of `states[z]`, decayed by the chunks between z and c, in time linear in their number: states
    `[batch, chunks, heads, size]`, and `[batch, chunks, heads]` by how much each chunk decays what was there.
    """
    count = states.shape[1]
    if count > BLOCK_SIZE:
        padding = -count % BLOCK_SIZE
        states = F.pad(states, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, BLOCK_SIZE))
        log_decay = F.pad(log_decay, (0, 0, 0, padding)).unflatten(1, (-1, BLOCK_SIZE))
        within = states_before(states.flatten(0, 1), log_decay.flatten(0, 1)).unflatten(0, states.shape[:2])
        added = within[:, :, -1] * log_decay[:, :, -1, :, None].exp() + states[:, :, -1]
        before = states_before(added, log_decay.sum(dim=2))
        since_start = F.pad(log_decay, (0, 0, 1, 0))[:, :, :-1].cumsum(dim=2)
        return (within + before[:, :, None] * since_start[..., None].exp()).flatten(1, 2)[:, :count]
    up_to = log_decay.transpose(1, 2).cumsum(dim=-1)
    before = F.pad(up_to, (1, 0))[..., :-1]
    is_past = torch.ones(count, count, dtype=torch.bool, device=states.device).tril(-1)
    decay = (before[..., :, None] - up_to[..., None, :]).masked_fill(~is_past, -math.inf).exp()
    return (decay @ states.transpose(1, 2)).transpose(1, 2)


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """
    A causal depthwise convolution with SiLU, tap by tap: torch.compile makes one kernel of it. Shapes: x `[batch, length, channels]`,
    weight `[channels, width]`.
    """
    length, width = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    output = sum(padded[:, tap : tap + length] * weight[:, tap].to(x.dtype) for tap in range(width))
    return F.silu(output + bias.to(x.dtype))


def step_bias_(bias: Tensor, low: float, high: float) -> None:
    """So that softplus of it is log-uniform between `low` and `high`."""
    step = torch.empty_like(bias).uniform_(math.log(low), math.log(high)).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))


def padding_mask_of(layout: Layout | None, has_cache: bool) -> Tensor | None:
    """
    Where tokens are real, `(batch, length)`, or `None` if all are. The rivals are there to be trained and evaluated on whole
    sequences, with padding at their ends: all else is a ValueError.
    """
    if has_cache or (layout is not None and layout.sequence_ids is not None):
        raise ValueError(
            "The rival mixers know neither caches nor packed sequences: use whole sequences, use_cache=False."
        )
    if layout is None or layout.padding_mask is None:
        return None
    # A graph that is being traced has no values to look at
    if layout.has_gaps and not is_tracing(layout.padding_mask):
        raise ValueError(
            "The attention mask has padding between real tokens, which convolutions and positions of the rival mixers would "
            "count as tokens: pad at the ends of the sequences."
        )
    return layout.padding_mask
