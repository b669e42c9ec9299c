# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What a program for ONNX computes, by standard operators alone, is what the package computes without it. No ONNX is needed here."""

import pytest
import torch

from gma_hf.ops.attention.chunked import attention as chunked
from gma_hf.ops.window import dense
from gma_hf.ops.window.plan import padding_first
from tests.modeling.window_problems import KeysApart, WindowProblem
from tests.ops.problems import Problem, assert_close


# float64 rounds at 1e-16; sums over some tens of tokens and dimensions, and divisions by small weights, amplify it
DOUBLE = 1e-9

CALLS = {
    "bidirectional": Problem(causal=False, normalizer=True, weights=True, key_heads=2, queries_per_mixture=2),
    "bidirectional, from a state": Problem(causal=False, state=True, mixtures_per_key_head=2),
    "bidirectional, un-normalised": Problem(causal=False, normalize=False, weights=True),
    "bidirectional, correlated": Problem(causal=False, correlate=True),
    "packed": Problem(causal=False, packed=True),
    "causal": Problem(weights=True, decay=True, state=True, normalizer=True, queries_per_mixture=2),
}
WINDOWS = {
    "causal": WindowProblem(40, 9, batch=2, padded=True, packed=True, sinks=True, softcap=2.0),
    "bidirectional": WindowProblem(40, 3, causal=False, batch=2, padded=True, packed=True, weighing=True),
    "sink tokens": WindowProblem(40, 9, batch=2, padded=True, packed=True, num_sink_tokens=2, softcap=2.0),
    "first keys": WindowProblem(
        40, 9, key_heads=1, repeats=3, whole=True, num_sink_tokens=4, leading=True, sinks=True
    ),
    "first keys, apart": KeysApart(40, 9, batch=2, whole=True, num_sink_tokens=3, leading=True),
    "long window": WindowProblem(20, 70, key_heads=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_attention_by_standard_operators(name, monkeypatch):
    expected = CALLS[name].results(backend="chunked")
    monkeypatch.setattr(chunked, "is_exporting_to_onnx", lambda: True)
    assert_close(expected, CALLS[name].results(backend="chunked"), DOUBLE)


@pytest.mark.parametrize("name", WINDOWS)
def test_window_by_standard_operators(name, monkeypatch):
    expected = WINDOWS[name].results(torch.float64)
    monkeypatch.setattr(dense, "is_exporting_to_onnx", lambda: True)
    assert_close(expected, WINDOWS[name].results(torch.float64), DOUBLE)


@pytest.mark.quick
def test_padding_moves_to_the_left_and_nothing_else_changes_places():
    is_real = torch.rand(64, 37, generator=torch.Generator().manual_seed(0)) < 0.6
    is_real[0], is_real[1] = True, False
    order, inverse = padding_first(is_real)
    expected = torch.argsort(is_real.to(torch.uint8), dim=1, stable=True)
    assert torch.equal(order, expected)
    assert torch.equal(inverse, expected.argsort(dim=1))
