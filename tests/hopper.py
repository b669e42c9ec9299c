# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A program that compiles kernels for an H100, where there is none, as they would be launched there: its arguments are a module with
a function `hopper_case`, and what that takes. Kernels are called, but nothing runs and results are what fresh memory holds.
"""

import importlib
import os
import sys


# The interpreter that the other tests use runs what a compiler refuses
os.environ["TRITON_INTERPRET"] = "0"
os.environ["GMA_HF_BACKEND"] = "triton"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


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


def compile_only() -> None:
    """From now on kernels are compiled and named, not run."""
    launch = JITFunction.run

    def compile_kernel(self, *args, warmup, **kwargs):
        print(self.fn.__name__)
        return launch(self, *args, warmup=True, **kwargs)

    driver.set_active(Hopper())
    JITFunction.run = compile_kernel


if __name__ == "__main__":
    compile_only()
    importlib.import_module(sys.argv[1]).hopper_case(*sys.argv[2:])
