# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The definition, tap by tap, for readers. `plain` and the kernels compute the same faster.

    y_p = SiLU(sum_j weight_j x_{p+j-b})        over the taps j whose token p + j - b is of the same sequence

inputs [B, N, C], weight [C, 1, K], sequence_ids [B, N] -> outputs [B, N - first, C], of the positions from `first` on.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_convolution(inputs, weight, sequence_ids, before, first) -> Tensor:
    """The convolution by its definition. See `short_convolution` for the arguments."""
    if sequence_ids is None:
        sequence_ids = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    return F.silu(taps_of_sequences(inputs, weight, sequence_ids, before)[:, first:])


def taps_of_sequences(inputs: Tensor, weight: Tensor, sequence_ids: Tensor, before: int) -> Tensor:
    """The sum over the taps, [B, N, C]. Taps that would reach into another sequence do not count."""
    width, length = weight.shape[2], inputs.shape[1]
    padded_inputs = F.pad(inputs, (0, 0, before, width - 1 - before))
    # No sequence has the number -1
    padded_ids = F.pad(sequence_ids, (before, width - 1 - before), value=-1)
    outputs = torch.zeros_like(inputs)
    for tap in range(width):
        is_same = padded_ids[:, tap : tap + length] == sequence_ids
        outputs = outputs + padded_inputs[:, tap : tap + length] * is_same[..., None] * weight[:, 0, tap]
    # Weights may be float32 beside 16-bit inputs: autocast leaves this product alone
    return outputs.to(inputs.dtype)
