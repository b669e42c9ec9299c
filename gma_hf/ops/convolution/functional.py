# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The public function of the depthwise short convolution. b of its K taps look back:

    y_p = SiLU(sum_j weight_j x_{p+j-b})        over the taps j whose token p + j - b is of the same sequence
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import Ways


# Each backend registers itself when the package imports it
WAYS = Ways("short convolution", ("triton", "pytorch"))


def short_convolution(
    inputs: Tensor,
    weight: Tensor,
    sequence_ids: Tensor | None,
    before: int,
    first: int,
    taps: Callable[[], Tensor] | None = None,
) -> Tensor:
    """
    The convolution at the positions from `first` on. Outside of the row there are no tokens.

    Args:
        inputs (`torch.Tensor` of shape `(batch, length, channels)`): one row per token.
        weight (`torch.Tensor` of shape `(channels, 1, kernel_size)`): one weight per channel and tap.
        sequence_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): packed sequences, which do not see each
            other.
        before (`int`): b, the number of taps that look back.
        first (`int`): position of the first output.
        taps (`Callable`, *optional*): returns the result of [`rows_of`] for the weight, for callers that keep it.

    Returns:
        `torch.Tensor` of shape `(batch, length - first, channels)`: the outputs, in the dtype of `inputs` or of autocast.
    """
    return WAYS.choose(inputs, weight).run(inputs, weight, sequence_ids, before, first, taps)


def rows_of(weight: Tensor) -> Tensor:
    """The weights tap by tap, `(kernel_size, channels)`, in float32, or in float64 for float64 weights."""
    return weight[:, 0].t().to(torch.promote_types(weight.dtype, torch.float32))
