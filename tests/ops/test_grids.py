# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels can be launched for any number of rows: a GPU takes 2^31 - 1 programs along the first axis of a grid, 65,535 along others."""

import importlib

import pytest
import torch

from gma_hf.ops import gaussian_mixture_attention
from gma_hf.ops.window.functional import window_softmax


pytest.importorskip("triton", reason="Triton has no wheel for this platform")

MODULES = (
    "attention.triton.operators",
    "attention.triton.passes",
    "attention.triton.decoding",
    "convolution.triton.fused",
    "rotation.triton.kernels",
    "window.triton.fused",
)
ROWS = 70_000


class Launches:
    """Stands for a kernel: notes its grid, and computes nothing."""

    def __init__(self, name: str, grids: list):
        self.name, self.grids = name, grids

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.grids.append((self.name, tuple(grid(options) if callable(grid) else grid)))

        return launch


@pytest.fixture
def grids(monkeypatch):
    """The grids of all launches, of which none is computed."""
    found = []
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (importlib.import_module(f"gma_hf.ops.{name}") for name in MODULES):
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Launches(name, found))
    return found


def attention(length: int, causal: bool):
    x = torch.zeros(ROWS // 2, 2, length, 2, requires_grad=length > 1)
    mixture = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), torch.zeros(2, 2)
    return gaussian_mixture_attention(x, x, x, *mixture, causal=causal)


def window():
    x = torch.zeros(ROWS // 2, 2, 3, 2, requires_grad=True)
    weight, bias, slope = torch.zeros(ROWS // 2, 2, 3), torch.zeros(2), torch.zeros(2, 2)
    return window_softmax(x, x, x, None, None, x, weight, bias, slope, size=2, causal=True, scaling=1.0)


def convolution():
    fused = importlib.import_module("gma_hf.ops.convolution.triton.fused")
    return fused.short_convolution(torch.zeros(ROWS, 3, 2, requires_grad=True), torch.zeros(2, 1, 2), None, 1, 0)


def rotation():
    kernels = importlib.import_module("gma_hf.ops.rotation.triton.kernels")
    x = torch.zeros(ROWS // 2, 2, 3, 4, requires_grad=True)
    return kernels.turn_back(x, torch.ones(1, 3, 2), torch.zeros(1, 3, 2), 4)


CALLS = {
    "causal": lambda: attention(3, True),
    "bidirectional": lambda: attention(3, False),
    "one token": lambda: attention(1, True),
    "window": window,
    "convolution": convolution,
    "rotation": rotation,
}


@pytest.mark.parametrize("case", CALLS)
def test_seventy_thousand_rows_can_be_launched(case, grids):
    output = CALLS[case]()
    if output.requires_grad:
        output.sum().backward()
    assert grids
    wrong = [(name, grid) for name, grid in grids if grid[0] >= 2**31 or any(size > 65_535 for size in grid[1:])]
    assert not wrong
    assert any(ROWS <= grid[0] for _, grid in grids)
