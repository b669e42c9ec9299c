# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Forgetting within a block of chunks: exp of sums of log a over segments, and its gradient.

    pairs_ij   = exp(sum_{j < l <= i} log a_l)     j <= i, both in chunk n: the part of the write of j that is left at i
    from_start = exp(sum_{l <= i} log a_l)         the part of the state before the chunk that is left at i
    to_end     = exp(sum_{l > j} log a_l)          the part of the write of j that is left after the chunk

log_decay [h, B, n, T]. h is 1 if all heads have the same decay, or the number of mixtures.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Decays(NamedTuple):
    """The decays of one block; queries that share a mixture are R * T rows."""

    pairs: Tensor  # [h, B, n, R * T, T], zero above the diagonal
    from_start: Tensor  # [h, B, n, R * T, 1]
    to_end: Tensor  # [h, B, n, T, 1]
    chunks: (
        Tensor  # [h, B, n + 1, n + 1], from the state before the block (0) or chunk j - 1's writes to before chunk i
    )
    whole_chunk: Tensor  # [h, B, n, 1]
    resets: Tensor  # [h, B, n, T], True where a token forgets everything before it


def smallest_decay(dtype: torch.dtype) -> float:
    """
    Smaller factors count as a reset: 1e-19 in float32, which is invisible beside anything larger than the eps of the read.
    The limit also keeps denormal numbers out of the matrix products: many CPUs are a hundred times slower on them.
    """
    return math.sqrt(torch.finfo(dtype).tiny)


def segment_decays(log_decay: Tensor) -> Tensor:
    """
    exp(x_{j+1} + ... + x_i) for j <= i, else 0: [..., length] -> [..., length, length].

    The segment sums are differences of cumulative sums. These are computed in float64 (if the device has it), so that short
    segments keep their digits after large ones.
    """
    wide = torch.float32 if log_decay.device.type == "mps" else torch.float64
    sums = log_decay.cumsum(dim=-1, dtype=wide)
    decays = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(log_decay.dtype).exp_().tril_()
    return F.threshold_(decays, smallest_decay(decays.dtype), 0.0)


def block_decays(log_decay: Tensor, strict: bool, repeats: int) -> Decays:
    """The decays of a block from its log_decay [h, B, n, T]. The rows of the queries are repeated `repeats` times."""
    smallest = smallest_decay(log_decay.dtype)
    # exp(-inf) and exp of the limit are both below the smallest decay; the latter has finite sums.
    log_decay = log_decay.clamp(min=2.0 * math.log(smallest))
    pairs = segment_decays(log_decay)
    from_start = F.threshold_(log_decay.cumsum(dim=-1).exp_(), smallest, 0.0)
    return Decays(
        pairs=(pairs.tril(-1) if strict else pairs).repeat(1, 1, 1, repeats, 1),
        from_start=from_start.repeat(1, 1, 1, repeats).unsqueeze(-1),
        to_end=pairs[..., -1, :].unsqueeze(-1),
        chunks=segment_decays(F.pad(log_decay.sum(dim=-1), (1, 0))),
        whole_chunk=from_start[..., -1:],
        resets=log_decay.exp() < smallest,
    )


def forget(pairs: Tensor, decays: Decays, signed: bool) -> Tensor:
    """
    Pair weights [M, B, n, R * T, T] times their decays, in the same memory if they are not signed. Denormal products become
    zero.
    """
    pairs, smallest = pairs.mul_(decays.pairs), torch.finfo(pairs.dtype).tiny ** 0.8
    return F.hardshrink(pairs, smallest) if signed else F.threshold_(pairs, smallest, 0.0)


def log_decay_gradient(at_read: Tensor, at_write: Tensor, kept: Tensor, carried: Tensor, decays: Decays) -> Tensor:
    """
    Gradient of log a_l, [h, B, n, T]: the contribution of every product that spans l to the loss.

    Args:
        at_read (`torch.Tensor` of shape `(M, B, n, T)`): products read at i: pairs (i, j) summed over j, and reads of the
            state.
        at_write (`torch.Tensor` of shape `(M, B, n, T)`): pairs (i, j) summed over i. Pairs with j >= l are in both sums and
            cancel.
        kept (`torch.Tensor` of shape `(M, B, n, T)`): the writes of j to the state after the chunk.
        carried (`torch.Tensor` of shape `(M, B, n, 1)`): the part of the state before the chunk that is left after it.
        decays (`Decays`): the decays of the block.

    Returns:
        `torch.Tensor` of shape `(h, B, n, T)`: the gradient.
    """
    read_behind = (at_read - at_write).flip(-1).cumsum(dim=-1).flip(-1)
    kept_before = kept.cumsum(dim=-1) - kept
    gradient = read_behind + kept_before + carried
    if decays.resets.shape[0] != gradient.shape[0]:
        gradient = gradient.sum(dim=0, keepdim=True)
    return gradient.masked_fill_(decays.resets, 0.0)
