# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""When the kernel of `triton` can undo rotations of halves. This file imports the kernel when it runs."""

import torch
from torch import Tensor

from ..dispatch import Way, not_in_forward_mode
from ..triton_support import DTYPES, is_on_gpu, missing
from .functional import WAYS


def cannot_run(query: Tensor, *others: Tensor) -> str | None:
    """Why the kernel cannot run a call, or `None`."""
    if not all(x.dtype in DTYPES for x in (query, *others)):
        return "queries, keys or angles are float64."
    return not_in_forward_mode() or missing(query.device.type, query.device.index)


def fused_undo(query, key, cos, sin, rotary_dim, columns, once) -> tuple[Tensor, Tensor]:
    """Undo the rotation by the kernel. See `Rotation.undo` for the arguments."""
    from .triton.kernels import turn_back

    cos, sin = (x.to(query.device) for x in (cos, sin))
    if query.shape[2] == 1 and query.dtype == key.dtype:
        # For one token, a copy costs less than another launch
        turned = turn_back(torch.cat([query, key], dim=1), cos, sin, rotary_dim, columns[0][0])
        return turned.split((query.shape[1], key.shape[1]), dim=1)
    return tuple(turn_back(x, cos, sin, rotary_dim, columns[0][0]) for x in (query, key))


WAYS.register(Way("triton", cannot_run, is_on_gpu, fused_undo))
