# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The tokens that a window and its memory look at: those of the call behind those that earlier calls left, in order, with the
first tokens of each sequence, the sinks, told apart.

Along a row stand T tokens: s sink slots and W slots of the window, of a history or empty, then the tokens of the call;
padding has been moved to the left. So the real tokens of a sequence follow each other without a gap, but for those that the
memory has swallowed between its sinks and its window: the j-th sink of a sequence that starts at place p stands at p + j.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention.functional import run_starts
from .sink_tokens import SinkTokens


class GMAWindowHistory(NamedTuple):
    """What a window of W tokens remembers between calls; its size does not depend on how many tokens were seen.

    The last W tokens are not in S and z yet, and the first s, the sink tokens, never will be: they have a place of their own
    when they have left the window. Rows with fewer tokens are filled from the left with invalid ones.
    """

    state: Tensor  # S [batch, heads, components, value_dim], in float32
    normalizer: Tensor  # z [batch, heads, components], in float32
    keys: Tensor  # [batch, key_value_heads, W, head_dim]
    values: Tensor  # [batch, key_value_heads, W, value_dim]
    valid: Tensor | None  # [batch, W], True at the tokens that exist; None if all W and all s are known to exist
    routing_keys: Tensor | None = None  # [batch, key_value_heads, W, routing_dim], where they are not the keys
    write_weight: Tensor | None = None  # [batch, h, W], of the tokens still to be written
    log_decay: Tensor | None = None  # [batch, h, W]
    sink_keys: Tensor | None = None  # [batch, key_value_heads, s, head_dim]
    sink_values: Tensor | None = None  # [batch, key_value_heads, s, value_dim]
    sink_valid: Tensor | None = None  # [batch, s]; None where `valid` is
    count: Tensor | None = None  # [batch], how many tokens are in S and z; if it was not kept, b must be 0


class WindowTokens(NamedTuple):
    """
    The tokens that can be seen: those of the call, behind those of the history where it may have one. The fields of the
    history, and runs.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None  # None if all are
    routing_keys: Tensor | None
    write_weight: Tensor | None
    log_decay: Tensor | None
    runs: Tensor | None  # [batch, length], number of the packed sequence

    def map(self, function: Callable[[Tensor], Tensor]) -> "WindowTokens":
        return WindowTokens(*(None if x is None else function(x) for x in self))


def token_dim(x: Tensor) -> int:
    """The dimension along which the tokens of keys, weights or flags stand."""
    return 1 if x.ndim == 2 else 2


def first_tokens(x: Tensor, length: int) -> Tensor:
    return x.narrow(token_dim(x), 0, length)


def last_tokens(x: Tensor, length: int) -> Tensor:
    return x.narrow(token_dim(x), x.shape[token_dim(x)] - length, length)


def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of `x` in the order `(batch, length)`."""
    dim = token_dim(x)
    index = order[(slice(None), *[None] * (dim - 1), slice(None), *[None] * (x.ndim - 1 - dim))]
    return x.gather(dim, index.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def take_queries(x: Tensor, order: Tensor) -> Tensor:
    """Queries, the last ones of all tokens, in an order of all tokens. What reads for the history is dropped later."""
    length = x.shape[2]
    past = order.shape[1] - length
    return take_tokens(x, (order[:, past:] - past).clamp(min=0))


def join_history(tokens: WindowTokens, history: GMAWindowHistory | None, size: int) -> WindowTokens:
    """
    The tokens behind those of the history, its sinks first, or behind `size` invalid ones; `valid` and `runs` may still be
    `None`.
    """
    valid, runs = tokens.valid, tokens.runs
    batch_size, length = tokens.keys.shape[0], tokens.keys.shape[2]
    if valid is None:
        rows = 1 if history is None else batch_size
        valid = torch.ones(rows, length, dtype=torch.bool, device=tokens.keys.device)
    if runs is not None:
        # The history and padding count to the first sequence
        first = runs.gather(1, valid.expand(batch_size, -1).to(torch.uint8).argmax(dim=1, keepdim=True))
        runs = torch.cat([first.expand(-1, size), torch.where(valid, runs, first)], dim=1)
    if size == 0:
        return tokens._replace(valid=valid, runs=runs)

    past = GMAWindowHistory(*[None] * 5) if history is None else with_sinks_in_front(history)

    def join(before: Tensor | None, now: Tensor | None, fill: float = 0.0) -> Tensor | None:
        if now is None and before is None:
            return None
        if now is None:
            now = before.new_full((*before.shape[:2], length), fill)
        if before is None:
            before_shape = [size if dim == token_dim(now) else n for dim, n in enumerate(now.shape)]
            before = now.new_full(before_shape, fill)
        return torch.cat([before.to(now.dtype), now], dim=token_dim(now))

    return WindowTokens(
        join(past.keys, tokens.keys),
        join(past.values, tokens.values),
        join(past.valid, valid, fill=history is not None),
        join(past.routing_keys, tokens.routing_keys),
        join(past.write_weight, tokens.write_weight, fill=1.0),
        join(past.log_decay, tokens.log_decay),
        runs,
    )


def with_sinks_in_front(history: GMAWindowHistory) -> GMAWindowHistory:
    """The window of a history behind its sink slots. What only the memory asks for is zero there: they do not get into it."""
    if history.sink_keys is None:
        return history
    num_sinks = history.sink_keys.shape[2]
    valid = None if history.valid is None else torch.cat([history.sink_valid, history.valid], dim=1)

    def widen(x: Tensor | None) -> Tensor | None:
        return None if x is None else F.pad(x, (*[0, 0] * (x.ndim - 1 - token_dim(x)), num_sinks, 0))

    return history._replace(
        keys=torch.cat([history.sink_keys, history.keys], dim=2),
        values=torch.cat([history.sink_values, history.values], dim=2),
        valid=valid,
        routing_keys=widen(history.routing_keys),
        write_weight=widen(history.write_weight),
        log_decay=widen(history.log_decay),
    )


def sequence_starts(tokens: WindowTokens) -> Tensor:
    """Where the sequence of a token starts, [batch or 1, T], or [batch or 1, 1] where a row is one sequence."""
    length, device = tokens.keys.shape[2], tokens.keys.device
    if tokens.valid is None:
        first = torch.zeros(1, 1, dtype=torch.long, device=device)
    else:
        first = length - tokens.valid.sum(dim=1, keepdim=True)
    if tokens.runs is None:
        return first
    places = torch.arange(length, device=device)
    starts = torch.where(run_starts(tokens.runs), places, 0).cummax(dim=1).values
    # Padding, to the left of all, counts to the first sequence
    return torch.maximum(starts, first)


def without_sinks(tokens: WindowTokens, starts: Tensor, num_sinks: int) -> WindowTokens:
    """The same, with only those valid that may get into the memory: neither sinks nor padding."""
    rank = torch.arange(tokens.keys.shape[2], device=starts.device) - starts
    return tokens._replace(valid=rank >= num_sinks)


def num_written(tokens: WindowTokens, causal: bool, before: Tensor | None) -> Tensor:
    """
    How many tokens of a sequence the memory holds when it has been given a token of it, [batch or 1, T]: with those that a
    history has [batch], causal, or all, bidirectional.
    """
    runs, length, device = tokens.runs, tokens.keys.shape[2], tokens.keys.device
    if causal and tokens.valid is None and runs is None and before is None:
        return torch.arange(1, length + 1, device=device)[None]
    if tokens.valid is None:
        is_real = torch.ones(1, length, dtype=torch.long, device=device)
    else:
        is_real = tokens.valid.long()
    if not causal:
        if runs is None:
            return is_real.sum(dim=1, keepdim=True)
        return torch.zeros_like(runs).scatter_add(1, runs, is_real.expand_as(runs)).gather(1, runs)
    count = is_real.cumsum(dim=1)
    past = 0 if before is None else before[:, None]
    if runs is None:
        return count + past
    # Less what stands before its run; a history is of the first
    count = count - torch.where(run_starts(runs), count - is_real, 0).cummax(dim=1).values
    return count + past * (runs == runs[:, :1])


def visible_sinks(tokens: WindowTokens, starts: Tensor, num_sinks: int, size: int, num_queries: int) -> SinkTokens:
    """What the last queries see of the sink tokens of their sequences: those that have left a window of `size` tokens."""
    length = tokens.keys.shape[2]
    rank = torch.arange(num_sinks, device=starts.device)
    newest = torch.arange(length - num_queries, length, device=starts.device) - size
    if tokens.runs is None:
        places = starts + rank  # [batch or 1, s]
        visible = places[:, None] <= newest[:, None]
        if tokens.valid is None:
            return SinkTokens(first_tokens(tokens.keys, num_sinks), first_tokens(tokens.values, num_sinks), visible)
        places = places.clamp(max=length - 1)
        return SinkTokens(take_tokens(tokens.keys, places), take_tokens(tokens.values, places), visible)
    places = last_tokens(starts, num_queries)[..., None] + rank  # [batch, n, s]
    return SinkTokens(tokens.keys, tokens.values, places <= newest[:, None], places.clamp(max=length - 1))


def kept_sinks(tokens: WindowTokens, starts: Tensor, num_sinks: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and validity of the last sequence's sinks that have left the window, for its history."""
    length = tokens.keys.shape[2]
    # A length that is still open (torch.export) is no int, and must not be decided on
    if tokens.valid is None and tokens.runs is None and isinstance(length, int) and length >= size + num_sinks:
        is_sink = torch.ones(tokens.keys.shape[0], num_sinks, dtype=torch.bool, device=starts.device)
        return first_tokens(tokens.keys, num_sinks), first_tokens(tokens.values, num_sinks), is_sink
    start = last_tokens(starts, 1)
    # While there are fewer than s of them they are what stands before the window; what is before their sequence is none
    places = start.clamp(max=length - size - num_sinks) + torch.arange(num_sinks, device=starts.device)
    is_sink, places = places >= start, places.clamp(min=0)
    keys, values = (
        take_tokens(x, places).masked_fill(~is_sink[:, None, :, None], 0) for x in (tokens.keys, tokens.values)
    )
    return keys, values, is_sink.expand(keys.shape[0], -1)
