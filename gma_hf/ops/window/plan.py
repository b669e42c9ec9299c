# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Which tokens a window, its sink tokens and its memory read. This depends on padding and packed sequences only, so it is
computed once for all layers of a call.

A row has T tokens, and the last N have queries: the tokens of the call. If there is a history, its W + s places stand before
them (s sink tokens, W tokens of the window). The real tokens of a sequence follow each other without a gap, except for the
tokens that only the memory holds, between its sink tokens and its window. The j-th sink token of a sequence that starts at
place p stands at p + j. A query at place i reads the memory as it is after the token at place i - W.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.call import run_starts


class WindowPlan(NamedTuple):
    """The tokens that a window and its memory read."""

    valid: Tensor | None  # [B or 1, T], which tokens exist; None if all do
    runs: Tensor | None  # [B, T], number of the packed sequence
    first: int  # the first of the tokens that are handed to the memory
    asked: int  # how many they are, and how many queries, the last, have a memory
    left_out: Tensor | None  # [B or 1, 1, asked], which of them the memory does not learn; None if it learns all
    write_weight: Tensor | None  # the others as numbers: 0 where left out, else 1
    written_runs: Tensor | None  # [B, asked]
    is_other: Tensor | None  # [B, 1, asked], whether what the memory knows is of another sequence than the query
    growth: Tensor  # [B or 1, 1, asked or 1], log(1 + n / W) of the n tokens in the memory
    count: Tensor  # [B or 1], n after the last token
    is_last: Tensor | None  # [B], whether the last token of the memory is of the last sequence
    size: int  # how many tokens a query sees exactly
    num_leading: int  # how many sinks are the first of all tokens
    sink_places: Tensor | None  # [B or 1, s] or, packed, [B, n, s]: where the sinks of the last n queries stand
    sink_visible: Tensor | None  # [B or 1, n, s]
    kept_places: Tensor | None  # [B, W], where the tokens stand that are in the window at the end; None for the last W
    kept_valid: Tensor | None  # [B or 1, W]
    kept_sink_places: Tensor | None  # [B or 1, s], and of the sinks that have left the window
    kept_sink_valid: Tensor | None  # [B or 1, s]


def token_dim(x: Tensor) -> int:
    """The dimension of the tokens in keys, weights or flags."""
    return 1 if x.ndim == 2 else 2


def first_tokens(x: Tensor, length: int) -> Tensor:
    return x.narrow(token_dim(x), 0, length)


def last_tokens(x: Tensor, length: int) -> Tensor:
    return x.narrow(token_dim(x), x.shape[token_dim(x)] - length, length)


def spread_index(order: Tensor, x: Tensor, dim: int) -> Tensor:
    """The index with which `gather` takes the tokens of `x` along `dim` in an order `(batch or 1, number)`."""
    index = order.view(order.shape[0], *[1] * (dim - 1), order.shape[1], *[1] * (x.ndim - 1 - dim))
    return index.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of `x` in the order `(batch or 1, length)`."""
    dim = token_dim(x)
    return x.gather(dim, spread_index(order, x, dim))


def padding_first(is_real: Tensor) -> tuple[Tensor, Tensor]:
    """
    The order in which padding stands to the left of all real tokens, and its inverse, both `(batch, length)`. Real tokens
    keep their order. The order is counted and not sorted, because ONNX has no stable sort.
    """
    number = is_real.long().cumsum(dim=1)
    places = torch.arange(is_real.shape[1], device=is_real.device)
    num_missing = is_real.shape[1] - number[:, -1:]
    inverse = torch.where(is_real, num_missing + number - 1, places - number)
    order = torch.zeros_like(inverse).scatter(1, inverse, places.expand_as(inverse))
    return order, inverse


def plan_window(
    batch_size: int,
    num_tokens: int,
    valid: Tensor | None,
    runs: Tensor | None,
    size: int,
    window_size: int,
    num_sinks: int,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    *,
    ends_at_last: bool = True,
    length: int | None = None,
    before: Tensor | int | None = None,
) -> WindowPlan:
    """
    Compute the plan of a window.

    Args:
        batch_size (`int`), num_tokens (`int`): B and T.
        valid (`torch.BoolTensor` of shape `(batch or 1, num_tokens)`, *optional*): which tokens exist. In each row they are
            contiguous.
        runs (`torch.LongTensor` of shape `(batch, num_tokens)`, *optional*): packed sequences, as runs of equal numbers.
        size (`int`): number of tokens that a query sees exactly; less than W if the row is shorter.
        window_size (`int`), num_sinks (`int`): W and s.
        causal (`bool`): whether a query sees the tokens before it only.
        dtype (`torch.dtype`): precision of the weight of the memory.
        device (`torch.device`): device of the tokens.
        ends_at_last (`bool`): whether the last token of each row exists.
        length (`int`, *optional*): N, if a history stands before the tokens of the call.
        before (`torch.Tensor` of shape `(batch,)` or `int`, *optional*): number of tokens in the memory of the history.

    Returns:
        [`WindowPlan`]: the plan.
    """
    if not causal:
        count = count_written(num_tokens, valid, runs, False, None, device)
        growth = (count.to(dtype) / window_size).log1p()[:, None]
        return WindowPlan(
            valid, runs, 0, num_tokens, *_writes(valid), runs, None, growth, count[:, -1], None, size, 0, *[None] * 6
        )
    if runs is not None:
        runs = run_starts(runs).cumsum(dim=1)
    start, first, end = row_bounds(num_tokens, valid, runs, ends_at_last, device)
    skipped, asked, is_empty = num_tokens - size - (length or 0), length, False
    if length is None:
        # Views leave out the sink tokens of a single sequence. Sink tokens of several sequences, or of padded rows, are not
        # written
        skipped = num_sinks if valid is None and runs is None else 0
        asked = num_tokens - size - skipped
        if asked <= 0:
            # No query has a memory. The mixture is still called, with a token that does not exist, so that there is a state,
            # hooks run, and every parameter has a gradient
            skipped, asked, is_empty = 0, 1, True
    written = None
    places = torch.arange(skipped, skipped + asked, device=device)
    if is_empty:
        written = torch.zeros(1, 1, dtype=torch.bool, device=device)
    elif valid is not None:
        written = valid.narrow(1, skipped, asked)
        if not ends_at_last:
            written = written & (places < end - size)
    if num_sinks > 0 and not is_empty and (valid is not None or runs is not None):
        is_late = places - start.narrow(1, skipped if runs is not None else 0, asked if runs is not None else 1)
        is_late = is_late >= num_sinks
        written = is_late if written is None else written & is_late
    written_runs = is_other = is_last = None
    if runs is not None:
        written_runs = runs.narrow(1, skipped, asked)
        is_other = (written_runs != last_tokens(runs, asked))[:, None]
        is_last = written_runs[:, -1] == runs[:, -1]
    count = count_written(asked, written, written_runs, True, before, device)
    growth = (count.to(dtype) / window_size).log1p()[:, None]
    last_count = count[:, -1] if is_last is None else count[:, -1] * is_last

    num_leading, sink_places, sink_visible = 0, None, None
    if num_sinks > 0 and length is None:
        num_queries, number = num_tokens - size, min(num_sinks, num_tokens - size)
        if num_queries > 0 and valid is None and runs is None:
            num_leading = number
        elif num_queries > 0:
            sink_places, sink_visible = visible_sinks(start, runs, number, size, num_queries, num_tokens)
    elif num_sinks > 0:
        sink_places, sink_visible = visible_sinks(start, runs, num_sinks, size, length, num_tokens)
    kept = kept_tokens(num_tokens, valid, runs, start, first, end, size, num_sinks, ends_at_last, device)
    return WindowPlan(
        valid, runs, skipped, asked, *_writes(written), written_runs, is_other, growth, last_count, is_last,
        size, num_leading, sink_places, sink_visible, *kept,
    )  # fmt: skip


def _writes(written: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if written is None else (~written[:, None], written[:, None].to(torch.float32))


def row_bounds(num_tokens: int, valid: Tensor | None, runs: Tensor | None, ends_at_last: bool, device: torch.device):
    """
    Where the sequence of a token starts, `(batch or 1, T)` or, if a row is one sequence, `(batch or 1, 1)`; the place of the
    first token of the row; and the place after its last token.
    """
    if valid is None:
        first = end = None
        start = torch.zeros(1, 1, dtype=torch.long, device=device)
    else:
        number = valid.sum(dim=1, keepdim=True)
        first = num_tokens - number if ends_at_last else valid.to(torch.uint8).argmax(dim=1, keepdim=True)
        start, end = first, None if ends_at_last else first + number
    if runs is not None:
        places = torch.arange(num_tokens, device=device)
        start = torch.where(run_starts(runs), places, 0).cummax(dim=1).values
        # Padding at the beginning belongs to the first sequence
        start = start if first is None else torch.maximum(start, first)
    return start, first, end


def count_written(
    length: int, written: Tensor | None, runs: Tensor | None, causal: bool, before, device: torch.device
) -> Tensor:
    """
    How many tokens of the sequence of each token the memory holds, [batch or 1, length]: causal, up to this token and with
    the tokens of a history; bidirectional, all.
    """
    if causal and written is None and runs is None and before is None:
        return torch.arange(1, length + 1, device=device)[None]
    if written is None:
        is_real = torch.ones(1, length, dtype=torch.long, device=device)
    else:
        is_real = written.long()
    if not causal:
        if runs is None:
            return is_real.sum(dim=1, keepdim=True)
        runs = run_starts(runs).cumsum(dim=1)
        return torch.zeros_like(runs).scatter_add(1, runs, is_real.expand_as(runs)).gather(1, runs)
    count = is_real.cumsum(dim=1)
    past = 0 if before is None else before[:, None] if isinstance(before, Tensor) else before
    if runs is None:
        return count + past
    # Minus the tokens before its run; a history belongs to the first run
    count = count - torch.where(run_starts(runs), count - is_real, 0).cummax(dim=1).values
    return count + past * (runs == runs[:, :1])


def visible_sinks(
    start: Tensor, runs: Tensor | None, num_sinks: int, size: int, num_queries: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """
    The places of the sink tokens of the sequences of the last queries, and which of them a query sees: the sink tokens that
    have left its window.
    """
    rank = torch.arange(num_sinks, device=start.device)
    newest = torch.arange(num_tokens - num_queries, num_tokens, device=start.device) - size
    if runs is None:
        places = start + rank  # [batch or 1, s]
        visible = places[:, None] <= newest[:, None]
    else:
        places = last_tokens(start, num_queries)[..., None] + rank  # [batch, n, s]
        visible = places <= newest[:, None]
    return places.clamp(max=num_tokens - 1), visible


def kept_tokens(
    num_tokens: int, valid, runs, start: Tensor, first, end, size: int, num_sinks: int, ends_at_last: bool, device
) -> tuple[Tensor | None, ...]:
    """`kept_places`, `kept_valid`, `kept_sink_places` and `kept_sink_valid` of the last sequence of each row."""
    places = valid_there = sink_places = sink_valid = None
    stop = num_tokens if end is None else end
    if not ends_at_last:
        places = end - torch.arange(size, 0, -1, device=device)
        valid_there = places >= first
        places = places.clamp(min=0)
        if runs is not None:
            taken = runs.gather(1, places)
            valid_there = valid_there & (taken == taken[:, -1:])
    elif isinstance(num_tokens, int) and num_tokens < size:
        valid_there = torch.arange(size, device=device)[None] >= size - num_tokens
        if valid is not None:
            valid_there = torch.nn.functional.pad(valid, (size - num_tokens, 0))
        if runs is not None:
            same = torch.nn.functional.pad(runs == runs[:, -1:], (size - num_tokens, 0))
            valid_there = valid_there & same
    else:
        if valid is None:
            valid_there = torch.ones(1, size, dtype=torch.bool, device=device)
        else:
            valid_there = last_tokens(valid, size)
        if runs is not None:
            valid_there = valid_there & (last_tokens(runs, size) == runs[:, -1:])
    if num_sinks > 0:
        last_start = start[:, -1:]
        # As long as there are fewer than s sink tokens, they are the tokens before the window, except tokens of other
        # sequences
        limit = stop - size - num_sinks
        if not isinstance(limit, Tensor):
            # Without `as_tensor`, which would compile a graph for this length only
            limit = torch.full((1, 1), limit, device=device)
        sink_places = torch.minimum(last_start, limit) + torch.arange(num_sinks, device=device)
        sink_valid, sink_places = sink_places >= last_start, sink_places.clamp(min=0)
    return places, valid_there, sink_places, sink_valid
