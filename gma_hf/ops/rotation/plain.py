# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Rotations of halves undone in PyTorch, queries and keys together. With the cosines and sines of the inverse,

    y = c x + s' roll(x)        s' = (s, -s): the sine of one half, and of the other half with the other sign

query [B, Hq, N, d], key [B, Hk, N, d], c and s [B or 1, N, columns].
"""

import torch
from torch import Tensor

from ..dispatch import Way
from .functional import WAYS, inverse


def undo_halves(query, key, cos, sin, rotary_dim, columns, once) -> tuple[Tensor, Tensor]:
    """Undo the rotation in PyTorch. See `Rotation.undo` for the arguments."""
    dtype, half = torch.promote_types(query.dtype, torch.float32), rotary_dim // 2

    def invert() -> tuple[Tensor, Tensor, Tensor]:
        c, s = (x[..., :half] for x in inverse(cos, sin, columns, dtype, query.device))
        # The cosines are kept as long as their id is used
        return torch.cat([c, c], dim=-1).unsqueeze(1), torch.cat([-s, s], dim=-1).unsqueeze(1), cos

    c, s, _ = once(("undo halves", id(cos), columns, dtype, rotary_dim), invert)
    whole = torch.cat([query, key], dim=1)
    x = whole if rotary_dim == whole.shape[-1] else whole[..., :rotary_dim]
    x = x.to(dtype)
    turned = torch.addcmul(x * c, x.roll(half, dims=-1), s).to(whole.dtype)
    if rotary_dim < whole.shape[-1]:
        turned = torch.cat([turned, whole[..., rotary_dim:]], dim=-1)
    return turned.split((query.shape[1], key.shape[1]), dim=1)


WAYS.register(Way("pytorch", run=undo_halves))
