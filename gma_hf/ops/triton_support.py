# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What the Triton kernels of all operators share: the devices that they run on, and the dtypes that they take."""

import importlib.util
import os

import torch

from ..compat import is_exporting_to_onnx


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256  # of a vector of one head: a tile has to fit a multiprocessor
INSTALLED = importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def missing(device_type: str, device_index: int | None) -> str | None:
    """What the machine lacks for kernels on a device, or `None`."""
    if is_exporting_to_onnx():
        return "ONNX has standard operators alone."
    if not INSTALLED:
        return "Triton is not installed (`pip install triton`)."
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the kernels run on GPUs (on a CPU only in Triton's interpreter, with TRITON_INTERPRET=1)."
    if device_type != "cuda":
        return f"the kernels do not run on {device_type!r} devices."
    if torch.version.hip is None and torch.cuda.get_device_capability(device_index) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 (Ampere) or newer."
    return None


def is_on_gpu(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the first tensor of a call is on a GPU. On a CPU, "auto" never takes the interpreter of Triton."""
    return x.is_cuda
