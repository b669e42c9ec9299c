# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""When the kernels of `triton` can run a short convolution. This file imports them when they run."""

from torch import Tensor

from ..dispatch import Way, not_in_forward_mode
from ..triton_support import DTYPES, is_on_gpu, missing
from .functional import WAYS


MAX_WIDTH = 8  # taps of a tile stay in registers


def cannot_run(inputs: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot run a call, or `None`."""
    if inputs.dtype not in DTYPES or weight.dtype not in DTYPES:
        return "the inputs or the weights are float64."
    if weight.shape[-1] > MAX_WIDTH:
        return f"it is wider than {MAX_WIDTH} tokens."
    return not_in_forward_mode() or missing(inputs.device.type, inputs.device.index)


def fused_convolution(inputs, weight, sequence_ids, before, first, taps=None) -> Tensor:
    """The convolution by the kernels. See `short_convolution` for the arguments."""
    from .triton import fused

    return fused.short_convolution(inputs, weight, sequence_ids, before, first)


WAYS.register(Way("triton", cannot_run, is_on_gpu, fused_convolution))
