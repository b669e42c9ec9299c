# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What every launch of a kernel needs."""

import functools
from collections.abc import Callable

import torch


def on_its_device(function: Callable) -> Callable:
    """Run `function` on the GPU of its first tensor: Triton launches on the current one, whatever the tensors live on."""

    @functools.wraps(function)
    def launch(first, *arguments):
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return launch
