# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Time and peak memory of one sequence-mixing operator against the length of the sequence, from 1k to 1M tokens.

    python benchmarks/kernels/scaling.py --plot                                # on a GPU: bfloat16
    python benchmarks/kernels/scaling.py --device cpu --plot                   # on a CPU: float32

One causal sequence, 8 heads of dimension 64 (a layer of width 512), 64 components. Softmax attention is PyTorch's
`scaled_dot_product_attention` as users call it and, on a GPU, forced to FlashAttention-2. Mamba-2 is the recurrence of its
published layer of that width: 16 heads of dimension 64, state 128, one group. Linear attention (elu + 1) and Mamba-2 are plain
PyTorch here; where flash-linear-attention is installed, its Triton kernels are measured too (the one of linear attention without
features and normaliser). Times are medians, of one call where a call takes longer than `--seconds`; on a CPU they are the CPU
time of the process, to which other programs do not add. Peak memory is everything that a call allocates or is given: inputs,
outputs, gradients and what lies between. What runs out of memory is kept as refused, what would take longer than `--longest` is
left out. The figure is drawn beside the output file,
that of committed results in docs/figures.
"""

import argparse
import ctypes
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch

from benchmarks.kernels.attention_cpu import check_correctness
from benchmarks.kernels.scaling_report import RIVALS, plot, tables
from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.timing import cpu_model, free_memory, median_time, or_refused, resident_memory, wall_time
from benchmarks.rivals.operators import MAMBA_STATE, Shape, make_inputs, measure_error


SHAPE = Shape(batch=1, length=0, heads=8)
LENGTHS = tuple(2**n for n in range(10, 21))
PASSES = ("forward", "forward_backward")


class Memory:
    """MiB allocated on the device (on a CPU: resident in this process), more than when this object was made."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            free_memory()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            # What the allocator keeps for later would hide the next call's memory
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = resident_memory("VmRSS")

    def peak(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return resident_memory("VmHWM") - self.before


def once(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call: by the clock on a GPU, CPU time on a CPU."""
    if device == "cuda":
        return 1e3 * wall_time(function)
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def measure(name: str, length: int, part: str, device: str, seconds: float) -> dict:
    """Median time and peak memory of one pass."""
    rival, memory = RIVALS[name], Memory(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = make_inputs(rival.names, SHAPE._replace(length=length), dtype, device)

    def forward():
        with torch.no_grad():
            rival.function(inputs)

    def forward_backward():
        output = rival.function(inputs)
        torch.autograd.grad(output, list(inputs.values()), torch.ones_like(output))

    function = forward if part == "forward" else forward_backward
    times = [once(function, device)]
    if device == "cuda":
        # The first call may have compiled kernels, and tried several: neither its time nor its memory counts
        torch.cuda.reset_peak_memory_stats()
        times = [once(function, device)]
    peak = memory.peak()
    if times[0] >= 1e3 * seconds:
        return {"ms": times[0], "calls": 1, "peak_mib": peak}
    if device == "cuda":
        return {"ms": median_time(function, seconds), "peak_mib": peak}
    while len(times) < 4 or sum(times) < 1e3 * seconds:
        times.append(once(function, device))
    return {"ms": statistics.median(times[1:]), "calls": len(times) - 1, "peak_mib": peak}


def too_long(last: dict, length: int, longest: float) -> str | None:
    """Why a length is not tried, judged by the row of the one before it; None if it is."""
    if "refused" in last:
        return last["refused"]
    seconds = last["ms"] / 1e3 * (length / last["length"]) ** RIVALS[last["rival"]].order
    return f"would take some {seconds:.0f} s" if seconds > longest else None


def no_memory(last: dict, length: int, available: float) -> str | None:
    """Why a CPU is not asked for so much: it would not refuse, but slow down or end other programs."""
    needed = last["peak_mib"] * length / last["length"]
    return f"would need some {needed / 1024:.0f} GiB" if needed > 0.7 * available else None


def measure_all(results: Results, options: argparse.Namespace) -> None:
    """
    Length by length, so that rivals of the same length are measured at about the same time. What is not tried is not kept
    either: a later run may have more time.
    """
    before = dict.fromkeys(itertools.product(options.rivals, PASSES))
    for length in sorted(options.lengths):
        for name, part in before:
            last, title, reason = before[name, part], f"{name}, {part}, {length}", None
            if last is not None and title not in results.rows:
                reason = too_long(last, length, options.longest)
                if reason is None and options.device == "cpu":
                    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
                    reason = no_memory(last, length, available)
            if reason is not None:
                print(f"\n=== {title}\nnot tried: {reason}")
                before[name, part] = {"refused": reason}
                continue
            # Whatever a rival refuses with is its result; ours may be refused for memory alone
            errors = (torch.cuda.OutOfMemoryError, MemoryError) if name.startswith("GMA") else Exception
            row = partial(measure, name, length, part, options.device, options.seconds)
            before[name, part] = row = results.measure(
                {"rival": name, "pass": part, "length": length}, or_refused, row, errors
            )
            print(", ".join(f"{field} {row[field]}" for field in ("ms", "peak_mib", "refused") if field in row))


def check(device: str) -> None:
    """SystemExit if GMA does not compute what it should: a wrong operator has no speed."""
    if device == "cpu":
        check_correctness()
    else:
        for variant in ("normalised", "un-normalised, decay"):
            measure_error(variant, SHAPE._replace(length=4096))


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    options.lengths = [length for length in options.lengths if length <= (options.max_length or max(options.lengths))]
    usable = [name for name, rival in RIVALS.items() if options.device == "cuda" or not rival.needs_gpu]
    options.rivals = options.rivals or usable
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    device = {"device": f"{cpu_model()}, {threads}", "dtype": "float32"}
    if options.device == "cuda":
        device = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16"}
    sizes = {"batch": 1, "heads": SHAPE.heads, "dim": SHAPE.dim, "components": SHAPE.components}
    mamba = {"mamba2_heads": 2 * SHAPE.heads, "mamba2_state": MAMBA_STATE}
    check(options.device)
    measure_all(Results(options.output, "scaling", {**device, **sizes, **mamba}), options)


def add_options(add) -> None:
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rivals", nargs="+", choices=list(RIVALS), help="default: all that run on the device")
    add("--lengths", type=int, nargs="+", default=list(LENGTHS))
    add("--max_length", type=int, help="leave out longer ones")
    add("--seconds", type=float, default=0.5, help="per measurement")
    add("--longest", type=float, default=20.0, help="seconds that one call may take")
    add("--threads", type=int, default=1, help="of a CPU; their times are added")


def main() -> None:
    command(__doc__, "scaling_*", add_options, run, tables, plot)


if __name__ == "__main__":
    main()
