# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The chunked pass that is there to be read computes the operator."""

import pytest
import torch
from torch.nn import functional as F

from gma_hf.ops.attention.minimal import minimal_attention

from .problems import EPS, Problem, assert_close


@pytest.mark.parametrize("chunk", [1, 4, 20])
def test_the_explained_pass_is_the_definition(chunk):
    problem = Problem(length=20, key_heads=3, weights=True, decay=True)
    tensors = problem.tensors()
    # A sum of logarithms that are not finite has no differences; 1e-50 of the past is nothing in float64
    tensors["log_decay"] = tensors["log_decay"].clamp(min=-115)
    expected = problem.run(tensors, backend="reference")
    actual = minimal_attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        tensors["means"],
        F.softplus(tensors["raw_variances"]) + 1e-4,
        tensors["prior_logits"].log_softmax(-1),
        tensors["write_weight"],
        tensors["log_decay"],
        eps=EPS,
        chunk=chunk,
    )
    assert_close({"output": expected["output"]}, {"output": actual}, 1e-11)


def test_without_forgetting_and_with_weight_one_it_is_the_paper_s():
    problem = Problem(length=128, key_heads=2)
    tensors = problem.tensors()
    ones = torch.ones(2, 2, 128, dtype=torch.float64)
    actual = minimal_attention(
        *(tensors[name] for name in ("query", "key", "value", "means")),
        F.softplus(tensors["raw_variances"]) + 1e-4,
        tensors["prior_logits"].log_softmax(-1),
        ones,
        torch.zeros_like(ones),
        eps=EPS,
    )
    assert_close({"output": problem.run(tensors, backend="reference")["output"]}, {"output": actual}, 1e-11)
