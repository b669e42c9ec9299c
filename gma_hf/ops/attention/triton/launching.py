# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Helpers for every launch of a kernel."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def on_its_device(function: Callable) -> Callable:
    """
    Run `function` on the GPU of its first tensor, because Triton launches on the current GPU, wherever the tensors are.
    """

    @functools.wraps(function)
    def launch(first, *arguments):
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return launch


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and token; the head stride is 0 if all heads share one."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def row_contiguous(x: Tensor) -> Tensor:
    """x, copied if the elements of a row are not adjacent in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, HQ, NQ, DV], with the heads of a token side by side, so that an output projection reads it without a copy."""
    batch, heads, length, _ = query.shape
    return value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
