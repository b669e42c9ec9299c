# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Times and memory of calls."""

import contextlib
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def free_memory() -> None:
    """Give back what unreachable tensors held."""
    gc.collect()
    torch.cuda.empty_cache()


def median_time(function: Callable[[], object], seconds: float) -> float:
    """Median milliseconds on the GPU, measured for `seconds` after half as long a warm-up; inputs leave the level 2 cache."""
    from triton.testing import do_bench

    return do_bench(function, warmup=500 * seconds, rep=1000 * seconds, return_mode="median")


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_time(function: Callable[[], object]) -> float:
    """Seconds of one call by the clock, the work on the GPU included."""
    wait_for_gpu()
    start = time.perf_counter()
    function()
    wait_for_gpu()
    return time.perf_counter() - start


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def or_refused(function: Callable[[], dict], errors: type[Exception] | tuple = torch.cuda.OutOfMemoryError) -> dict:
    """The row that a function measures, or why it was refused."""
    free_memory()
    try:
        return function()
    except errors as error:
        return {"refused": first_line(error)}


def softmax_by(name: str) -> contextlib.AbstractContextManager:
    """Forces FlashAttention-2 for what has it in its name; PyTorch chooses for all others, on Hopper cuDNN."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "FlashAttention" in name else contextlib.nullcontext()


def peak_bytes(function: Callable[[], object]) -> tuple[object, int]:
    """What a function returns, and the bytes on the GPU that were in use at most while it ran."""
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated()


def resident_memory(field: str) -> float:
    """MiB of resident memory of this process: VmRSS now, VmHWM at most since the mark was reset (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"error: /proc/self/status has no {field}: peak memory is measured on Linux only.")


def cpu_model() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
