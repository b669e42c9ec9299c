# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
One further token behind a window: decoding. The equations are those of `window.py`; with one query, and nothing to tell apart
but what is there, a token costs a few operations instead of hundreds, most of which would move tokens about.

The oldest token leaves the window. As long as there is room, it is a sink; then it is written into the memory. The query sees
what has stayed, itself, the sinks and the memory.

B rows, Hq query heads, Hk key/value heads, W tokens in the window, s sinks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import accumulation_dtype
from .tokens import GMAWindowHistory, WindowTokens, first_tokens, last_tokens, token_dim


def is_step(tokens: WindowTokens, history: GMAWindowHistory | None) -> bool:
    """Whether a call is a step: one real token, behind a history that keeps of its tokens what this one has, too."""
    length = tokens.keys.shape[2]
    if history is None or not isinstance(length, int) or length != 1:
        return False
    if tokens.valid is not None or tokens.runs is not None:
        return False
    kept = (history.routing_keys, history.write_weight, history.log_decay)
    given = (tokens.routing_keys, tokens.write_weight, tokens.log_decay)
    return all((x is None) == (y is None) for x, y in zip(kept, given, strict=True))


def shifted(window: Tensor, new: Tensor, in_front: Tensor | None = None) -> Tensor:
    """A window without its first token and with a new one behind its last, optionally with others in front of it."""
    dim = token_dim(window)
    kept = last_tokens(window, window.shape[dim] - 1)
    parts = [kept, new] if in_front is None else [in_front, kept, new]
    if window.dtype != new.dtype:
        parts = [x.to(new.dtype) for x in parts]
    return torch.cat(parts, dim=dim)


def leave_window(history: GMAWindowHistory) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """
    Whether the oldest token is to be written, [B, 1], or `None` if it is in every row, and keys, values and validity of the
    sinks after it has left.
    """
    if history.valid is None:
        return None, (history.sink_keys, history.sink_values, None)
    is_real = first_tokens(history.valid, 1)
    if history.sink_keys is None:
        return is_real, (None, None, None)
    # Sinks stand to the right: there is room as long as the first place is empty
    is_full = first_tokens(history.sink_valid, 1)
    is_sink = is_real & ~is_full
    sinks = []
    for kept, window in (
        (history.sink_keys, history.keys),
        (history.sink_values, history.values),
        (history.sink_valid, history.valid),
    ):
        becomes = is_sink if kept.ndim == 2 else is_sink[:, None, :, None]
        sinks.append(torch.where(becomes, shifted(kept, first_tokens(window, 1).to(kept.dtype)), kept))
    return is_real & is_full, tuple(sinks)


def step(
    read_memory: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, Tensor]]],
    weigh: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    tokens: WindowTokens,
    history: GMAWindowHistory,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, GMAWindowHistory]:
    """
    Attention of the next token.

    Args:
        read_memory (`Callable`): the mixture, from a key, a value, a write weight, a log-decay and a state to r
            `(batch, heads, 1, value_dim)`, D `(batch, heads, 1)` and the new S and z.
        weigh (`Callable`): from D and n `(batch, 1)` to the memory's logit `(batch, heads, 1)`, -inf if it is empty.
        query (`torch.Tensor` of shape `(batch, heads, 1, head_dim)`): of the softmax.
        tokens (`WindowTokens`): the token.
        history (`GMAWindowHistory`): of the tokens before it.
        scaling, softcap, sinks: as in [`GMAWindow`].

    Returns:
        The output `(batch, heads, 1, value_dim)`, and the history with the token.
    """
    is_written, sink_tokens = leave_window(history)
    write_weight, log_decay = (
        None if x is None else first_tokens(x, 1) for x in (history.write_weight, history.log_decay)
    )
    written = 1
    if is_written is not None:
        is_there = is_written[:, None].to(history.normalizer.dtype)
        write_weight = is_there if write_weight is None else is_there * write_weight
        if log_decay is not None:
            log_decay = log_decay.masked_fill(~is_written[:, None], 0.0)
        written = is_written[:, 0].long()
    routing_keys = history.keys if history.routing_keys is None else history.routing_keys
    oldest = (first_tokens(routing_keys, 1).to(query.dtype), first_tokens(history.values, 1))
    read, normalizer, (state, z) = read_memory(
        *oldest, write_weight=write_weight, log_decay=log_decay, initial_state=(history.state, history.normalizer)
    )
    count = written if history.count is None else history.count + written
    memory_logit = weigh(normalizer, count[:, None])

    sink_keys, sink_values, sink_valid = sink_tokens
    keys, values = shifted(history.keys, tokens.keys, sink_keys), shifted(history.values, tokens.values, sink_values)
    valid = None
    if history.valid is not None:
        valid = shifted(history.valid, torch.ones_like(is_written), sink_valid)
    output = attend_step(query, keys, values, valid, read, memory_logit, scaling, softcap, sinks)
    # The window behind its sinks is seen at once; they are kept apart
    size = history.keys.shape[2]
    window = [None if x is None else last_tokens(x, size) for x in (keys, values, valid)]
    others = [
        None if new is None else shifted(old, new)
        for old, new in (
            (history.routing_keys, tokens.routing_keys),
            (history.write_weight, tokens.write_weight),
            (history.log_decay, tokens.log_decay),
        )
    ]
    return output, GMAWindowHistory(state, z, *window, *others, *sink_tokens, count=count)


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
    """o [B, Hq, 1, dv] of one query per row, from the keys [B, Hk, T, d] that it may see, r and m + log D."""
    dtype = accumulation_dtype(query, values)
    batch_size, num_heads, (num_key_heads, num_keys) = *query.shape[:2], keys.shape[1:3]
    # Queries that share a key are rows of one matrix
    rows = (batch_size * num_key_heads, num_heads // num_key_heads)
    queries = (query.to(dtype) * scaling).reshape(*rows, -1)
    logits = torch.bmm(queries, keys.to(dtype).flatten(0, 1).transpose(1, 2)).view(batch_size, num_heads, num_keys)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], float("-inf"))
    logits = [logits, memory_logit]
    if sinks is not None:
        logits.append(sinks.to(dtype)[:, None].expand(batch_size, -1, 1))
    weights = torch.cat(logits, dim=-1).softmax(dim=-1)
    near = torch.bmm(weights[..., :num_keys].reshape(*rows, num_keys), values.to(dtype).flatten(0, 1))
    near = near.view(batch_size, num_heads, 1, -1)
    return torch.addcmul(near, weights[..., num_keys, None, None], read).to(values.dtype)
