# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The short convolution in PyTorch: `conv1d`, a sum for a single token, and tap by tap where packed sequences are apart.

inputs [B, N, C], weight [C, 1, K], sequence_ids [B, N] -> outputs [B, N - first, C], of the positions from `first` on.
"""

from torch import Tensor
from torch.nn import functional as F

from ..dispatch import Way
from .functional import WAYS, rows_of
from .reference import taps_of_sequences


def plain_convolution(inputs, weight, sequence_ids, before, first, taps=None) -> Tensor:
    """The convolution in PyTorch. See `short_convolution` for the arguments."""
    channels, _, width = weight.shape
    # The bidirectional case comes first, because its length may be symbolic (torch.export)
    if sequence_ids is None and first == width - 1 and inputs.shape[1] == width:
        # For one token, a sum of products is faster than a convolution
        rows = rows_of(weight) if taps is None else taps()
        outputs = (inputs * rows).sum(dim=1, keepdim=True).to(inputs.dtype)
    elif sequence_ids is None:
        channels_first = F.pad(inputs.transpose(1, 2), (before - first, width - 1 - before))
        outputs = F.conv1d(channels_first, weight, groups=channels).transpose(1, 2)
    else:
        outputs = taps_of_sequences(inputs, weight, sequence_ids, before)[:, first:]
    return F.silu(outputs)


WAYS.register(Way("pytorch", run=plain_convolution))
