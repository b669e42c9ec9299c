# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Select tokens at places that differ between rows."""

import torch
from torch import Tensor

from ..ops.window.plan import spread_index


def take(x: Tensor, dim: int, places: Tensor, exists: Tensor | None = None) -> Tensor:
    """The tokens of `x` along `dim` at places `(batch or 1, number)`; zeros at places that do not exist."""
    taken = x.gather(dim, spread_index(places.to(x.device), x, dim))
    return taken if exists is None else taken.masked_fill(~spread_index(exists.to(x.device), taken, dim), 0)


def last_real(padding_mask: Tensor, number: int, offset: int) -> tuple[Tensor, Tensor]:
    """The places of the last real tokens, right-aligned, and which of them exist."""
    length = padding_mask.shape[1]
    wanted = padding_mask.sum(dim=1, keepdim=True) - torch.arange(number - 1, -1, -1, device=padding_mask.device)
    places = torch.searchsorted(padding_mask.long().cumsum(dim=1), wanted.clamp(min=1))
    return places.clamp(max=length - 1) + offset, wanted >= 1
