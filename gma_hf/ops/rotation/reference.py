# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The definition for rotations of halves, for readers: dimension i was rotated with dimension i + D / 2, by c_i and s_i.

    y_i = (c_i x_i + s_i x_{i+D/2}) / (c_i^2 + s_i^2)        y_{i+D/2} = (c_i x_{i+D/2} - s_i x_i) / (c_i^2 + s_i^2)

x [B, H, N, d], of which the first D dimensions were rotated; c and s [B or 1, N, D / 2 or more].
"""

import torch
from torch import Tensor


def reference_undo(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, columns) -> Tensor:
    """Undo the rotation by its definition. See `Rotation.undo` for the arguments."""
    half = rotary_dim // 2
    c, s = cos[:, None, :, :half], sin[:, None, :, :half]
    first, second, rest = x.split((half, half, x.shape[-1] - rotary_dim), dim=-1)
    turned_first, turned_second = (c * first + s * second) / (c**2 + s**2), (c * second - s * first) / (c**2 + s**2)
    is_undone = [any(start <= i < stop for start, stop in columns) for i in range(half)]
    is_undone = torch.tensor(is_undone, device=x.device)
    return torch.cat(
        [torch.where(is_undone, turned_first, first), torch.where(is_undone, turned_second, second), rest], dim=-1
    )
