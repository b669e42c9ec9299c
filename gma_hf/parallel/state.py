# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The memory across the border of two processes. The state after a part of a sequence is an affine function of the state before
it:

    S_out = e^A S_in + S_local        A = sum of the log decays of the part, per head
    z_out = e^A z_in + z_local        S_local, z_local: the writes of the part into an empty memory

So every process computes (S_local, z_local, A) of its own part. All processes gather these numbers, once per layer and in
float32, and each process adds up the parts before its own part:

    S_in(r) = sum_{j < r} e^{A_{j+1} + ... + A_{r-1}} S_local(j)

Bidirectional calls have no decay, and a process adds up all other parts. S_local is the sum of a bidirectional read of the
part, with the write weights w_t e^{sum of the log decays after t}. It takes half of the work of the operator; this is the
cost of context parallelism besides the message. The message has B H (C dv + C + 1) numbers for B rows and H mixtures.
"""

import torch
from torch import Tensor

from ..ops.attention.call import run_starts
from ..ops.attention.mixture import repeat_heads
from .collectives import gather


State = tuple[Tensor, Tensor]


def decayed_weights(
    write_weight: Tensor | None, log_decay: Tensor | None, runs: Tensor | None, mixtures: int
) -> tuple[Tensor | None, Tensor | None]:
    """
    The weights of the tokens that are left at the end of the part, `(batch, h, length)`, and A, `(batch, h)`, which is -inf
    if a new sequence starts in the part.
    """
    if runs is not None:
        starts = run_starts(runs)[:, None]
        if log_decay is None:
            log_decay = torch.zeros_like(starts, dtype=torch.float32)
        log_decay = log_decay.masked_fill(starts, float("-inf"))
    if log_decay is None:
        return write_weight, None
    log_decay = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32))
    passed = log_decay.flip(2).cumsum(2).flip(2)  # from a token on
    behind = torch.cat([passed[:, :, 1:], torch.zeros_like(passed[:, :, :1])], dim=2)
    weight = behind.exp()
    if write_weight is not None:
        if write_weight.shape[1] != weight.shape[1]:
            write_weight, weight = repeat_heads(write_weight, mixtures), repeat_heads(weight, mixtures)
        weight = write_weight.to(weight.dtype) * weight
    return weight, passed[:, :, 0]


def exchange_states(group, S: Tensor, z: Tensor, total: Tensor | None, link: Tensor | None) -> tuple[Tensor, ...]:
    """`(R, batch, mixtures, ...)` of S, z and A (`None` without forgetting), in one message; and the new link."""
    batch, mixtures, components, value_dim = S.shape
    parts = [S.flatten(2), z] if total is None else [S.flatten(2), z, total.expand(batch, mixtures)[..., None]]
    gathered, link = gather(group, torch.cat([x.to(S.dtype) for x in parts], dim=2), link)
    size = components * value_dim
    S = gathered[..., :size].unflatten(3, (components, value_dim))
    z = gathered[..., size : size + components]
    return S, z, None if total is None else gathered[..., -1], link


def add_before(S: Tensor, z: Tensor, total: Tensor | None, rank: int) -> State:
    """S_in and z_in of a process, by Horner's rule."""
    if total is None or rank == 0:
        # The empty sum is connected with the message, so that the first process takes part in its backward pass
        return S[:rank].sum(0), z[:rank].sum(0)
    S_in, z_in = S[0], z[0]
    for j in range(1, rank):
        left = total[j].exp()
        S_in, z_in = left[..., None, None] * S_in + S[j], left[..., None] * z_in + z[j]
    return S_in, z_in


def add_others(S: Tensor, z: Tensor, rank: int) -> State:
    """The writes of all other processes."""
    return tuple(torch.cat([x[:rank], x[rank + 1 :]]).sum(0) for x in (S, z))
