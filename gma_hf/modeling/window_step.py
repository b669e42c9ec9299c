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

from .window_blocks import accumulation_dtype
from .window_tokens import GMAWindowHistory, WindowTokens, first_tokens, last_tokens, token_dim


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


def shifted(window: Tensor, new: Tensor) -> Tensor:
    """A window without its first token and with a new one behind its last."""
    dim = token_dim(window)
    return torch.cat([last_tokens(window, window.shape[dim] - 1).to(new.dtype), new], dim=dim)


def leave_window(history: GMAWindowHistory) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Whether the oldest token is to be written, [B, 1], and keys, values and validity of the sinks after it has left."""
    is_real = first_tokens(history.valid, 1)
    if history.sink_keys is None:
        return is_real, ()
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
        weigh (`Callable`): from log D and n `(batch, 1)` to the memory's logit `(batch, heads, 1)`, -inf if it is empty.
        query (`torch.Tensor` of shape `(batch, heads, 1, head_dim)`): of the softmax.
        tokens (`WindowTokens`): the token.
        history (`GMAWindowHistory`): of the tokens before it.
        scaling, softcap, sinks: as in [`GMAWindow`].

    Returns:
        The output `(batch, heads, 1, value_dim)`, and the history with the token.
    """
    is_written, sink_tokens = leave_window(history)
    write_weight, log_decay = is_written[:, None].to(history.normalizer.dtype), None
    if history.write_weight is not None:
        write_weight = write_weight * first_tokens(history.write_weight, 1)
    if history.log_decay is not None:
        log_decay = first_tokens(history.log_decay, 1).masked_fill(~is_written[:, None], 0.0)
    routing_keys = history.keys if history.routing_keys is None else history.routing_keys
    oldest = (first_tokens(x, 1) for x in (routing_keys.to(query.dtype), history.values))
    read, normalizer, (state, z) = read_memory(
        *oldest, write_weight=write_weight, log_decay=log_decay, initial_state=(history.state, history.normalizer)
    )
    count = is_written[:, 0].long() if history.count is None else history.count + is_written[:, 0]
    memory_logit = weigh(normalizer.log(), count[:, None])

    tokens = tokens._replace(valid=torch.ones_like(is_written))
    window = [
        None if new is None else shifted(getattr(history, name), new)
        for name, new in tokens._asdict().items()
        if name != "runs"
    ]
    seen = window[:3]
    if sink_tokens:
        seen = [torch.cat([x.to(y.dtype), y], dim=token_dim(y)) for x, y in zip(sink_tokens, seen, strict=True)]
    output = attend_step(query, *seen, read, memory_logit, scaling, softcap, sinks)
    return output, GMAWindowHistory(state, z, *window, *sink_tokens, count=count)


def attend_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    read: Tensor,
    memory_logit: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """o [B, Hq, 1, dv] of one query per row, from the keys [B, Hk, T, d] that it may see, r and m + log D."""
    dtype = accumulation_dtype(query, values)
    batch_size, num_heads, num_keys = *query.shape[:2], keys.shape[2]
    queries = query.reshape(batch_size, keys.shape[1], -1, query.shape[3]).to(dtype) * scaling
    logits = queries @ keys.to(dtype).transpose(2, 3)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~valid[:, None, None], float("-inf")).flatten(1, 2)  # [B, Hq, T]
    logits = [logits, memory_logit]
    if sinks is not None:
        logits.append(sinks.to(dtype)[:, None].expand(batch_size, -1, 1))
    weights = torch.cat(logits, dim=-1).softmax(dim=-1)
    near = weights[..., :num_keys].unflatten(1, (keys.shape[1], -1)) @ values.to(dtype)
    output = near.reshape(batch_size, num_heads, 1, -1) + weights[..., num_keys, None, None] * read.to(dtype)
    return output.to(values.dtype)
