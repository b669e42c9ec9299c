# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A program that compiles the window's kernels for an H100, where there is none, as they would be launched there: the name of a
case of test_window_kernels.py and that of a dtype are its arguments. Kernels are called, but nothing runs and results are what
fresh memory holds.
"""

import os
import sys


# The interpreter that the other tests use runs what a compiler refuses
os.environ["TRITON_INTERPRET"] = "0"
os.environ["GMA_HF_BACKEND"] = "triton"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gma_hf.ops.window import softmax as window_softmax


class Hopper:
    """What Triton asks a driver when it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_for_hopper(case: str, dtype: torch.dtype) -> None:
    launch = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        print(self.fn.__name__)
        return launch(self, *args, warmup=True, **kwargs)

    driver.set_active(Hopper())
    JITFunction.run = compile_only
    window_softmax.missing = lambda *device: None
    from tests.modeling.test_window_kernels import CASES

    CASES[case].results(dtype)


if __name__ == "__main__":
    compile_for_hopper(sys.argv[1], getattr(torch, sys.argv[2]))
