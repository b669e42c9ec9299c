# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The short convolution and the inverse of rotary positions are what their readable definitions say."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gma_hf.ops.convolution.functional import short_convolution
from gma_hf.ops.convolution.reference import reference_convolution
from gma_hf.ops.rotation.functional import Rotation
from gma_hf.ops.rotation.reference import reference_undo


pytestmark = pytest.mark.quick
# Float64: a sum of a few products in another order
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def by_hand(inputs, weight, sequence_ids, before):
    """The convolution as its formula says, one number after the other."""
    batch, length, _ = inputs.shape
    sums = torch.zeros_like(inputs)
    for row in range(batch):
        for p in range(length):
            for tap in range(weight.shape[2]):
                other = p + tap - before
                if 0 <= other < length and sequence_ids[row, other] == sequence_ids[row, p]:
                    sums[row, p] += weight[:, 0, tap] * inputs[row, other]
    return sums * sums.sigmoid()


@pytest.mark.parametrize("before", [3, 2, 0])
@pytest.mark.parametrize("packed", [False, True])
def test_the_short_convolution_is_its_formula(before, packed):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 9, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 1, 4, dtype=torch.float64, generator=generator)
    sequence_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 9]) if packed else None
    ids = torch.zeros(2, 9) if sequence_ids is None else sequence_ids
    expected = by_hand(inputs, weight, ids, before)
    for first in {0, before}:
        for function in (reference_convolution, short_convolution):
            outputs = function(inputs, weight, sequence_ids, before, first)
            torch.testing.assert_close(outputs, expected[:, first:], **EXACT)


@pytest.mark.parametrize("columns", [((0, 12),), ((2, 6), (8, 12))], ids=["all", "slow"])
@pytest.mark.parametrize("once", [False, True])
def test_the_inverse_of_a_rotation_is_its_formula(columns, once):
    """With a factor, as scaled frequencies have it; dimensions that were not rotated stay."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 7, 16, dtype=torch.float64, generator=generator) for heads in (4, 2))
    angles = 100 * torch.rand(2, 7, 6, dtype=torch.float64, generator=generator)
    cos, sin = (1.3 * torch.cat([x, x], dim=-1) for x in (angles.cos(), angles.sin()))
    kept = {}

    def keep(name, compute):
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    rotation = Rotation(apply_rotary_pos_emb, cos, sin)
    arguments = (12, columns, keep) if once else (12, columns)
    for _ in range(2):
        undone = rotation.undo(query, key, *arguments)
        for x, y in zip((query, key), undone, strict=True):
            torch.testing.assert_close(y, reference_undo(x, cos, sin, 12, columns), **EXACT)
    assert len(kept) == once
    if columns == ((0, 12),):
        turned = apply_rotary_pos_emb(query[..., :12], key[..., :12], cos, sin)
        for x, y in zip((query, key), turned, strict=True):
            whole = torch.cat([y, x[..., 12:]], dim=-1)
            torch.testing.assert_close(reference_undo(whole, cos, sin, 12, columns), x, **EXACT)
