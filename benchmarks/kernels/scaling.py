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
left out. The figure is drawn beside the output file.
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.attention_cpu import check_correctness
from benchmarks.kernels.scaling_report import plot, tables
from benchmarks.lib.results import Results, add_output_options, output_path, stored
from benchmarks.lib.timing import cpu_model, first_line, free_memory, median_time, resident_memory
from benchmarks.rivals.linear_attention import linear_attention
from benchmarks.rivals.mamba2 import state_space
from benchmarks.rivals.operators import QKV, VARIANTS, Shape, fla, flash_attention, make_inputs, relative_error, sdpa
from gma_hf.ops import gaussian_mixture_attention


HEADS, DIM, COMPONENTS = 8, 64, 64
MAMBA_HEADS, MAMBA_STATE = 16, 128
LENGTHS = tuple(2**n for n in range(10, 21))
PASSES = ("forward", "forward_backward")


class Rival(NamedTuple):
    """An operator.

    Attributes:
        function: of the inputs.
        inputs: makes them as leaves, given length, dtype and device.
        order: of the growth of its time with the length.
        needs_gpu: whether it runs on a GPU only.
    """

    function: Callable[[dict[str, Tensor]], Tensor]
    inputs: Callable[[int, torch.dtype, str], dict[str, Tensor]]
    order: int = 1
    needs_gpu: bool = False


def tokens_of_a_layer(names: tuple[str, ...]) -> Callable[[int, torch.dtype, str], dict[str, Tensor]]:
    return lambda length, dtype, device: make_inputs(names, Shape(1, length, HEADS, DIM, COMPONENTS), dtype, device)


def gma(variant: str) -> Rival:
    names, normalize = VARIANTS[variant]

    def function(x: dict[str, Tensor]) -> Tensor:
        # A backend by its name, so that nothing falls back unnoticed
        backend = "triton" if x["query"].is_cuda else "chunked"
        return gaussian_mixture_attention(**x, normalize=normalize, backend=backend)

    return Rival(function, tokens_of_a_layer(names))


def elu_attention(x: dict[str, Tensor]) -> Tensor:
    query, key = (F.elu(x[name].float()) + 1 for name in ("query", "key"))
    return linear_attention(query, key, x["value"])


def mamba_inputs(length: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of the recurrence `h_t = exp(-rate dt_t) h_{t-1} + dt_t B_t x_t^T`, `y_t = C_t h_t`."""
    torch.manual_seed(1)
    inputs = {
        "x": torch.randn(1, length, MAMBA_HEADS, DIM, device=device),
        "B": torch.randn(1, length, MAMBA_STATE, device=device),
        "C": torch.randn(1, length, MAMBA_STATE, device=device),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs["dt"] = 0.1 * torch.rand(1, length, MAMBA_HEADS, device=device)
    inputs["rate"] = torch.linspace(1, 16, MAMBA_HEADS, device=device)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def mamba(x: dict[str, Tensor]) -> Tensor:
    return state_space(**x)


def mamba_in_triton(x: dict[str, Tensor]) -> Tensor:
    """The same recurrence as decayed linear attention: C reads, B writes, dt x is written."""
    from fla.ops.simple_gla import chunk_simple_gla

    query, key = (x[name][:, :, None].expand(-1, -1, MAMBA_HEADS, -1) for name in ("C", "B"))
    value = x["x"] * x["dt"][..., None].to(x["x"].dtype)
    return chunk_simple_gla(query, key, value, g=-x["dt"] * x["rate"], scale=1.0)[0]


RIVALS = {
    "GMA, paper": gma("normalised"),
    "GMA, gated": gma("un-normalised, decay"),
    "softmax (SDPA)": Rival(sdpa, tokens_of_a_layer(QKV), order=2),
    "softmax (FlashAttention-2)": Rival(flash_attention, tokens_of_a_layer(QKV), order=2, needs_gpu=True),
    "linear attention": Rival(elu_attention, tokens_of_a_layer(QKV)),
    "Mamba-2": Rival(mamba, mamba_inputs),
    "linear attention, fla": Rival(
        fla("linear_attn", normalize=False).function, tokens_of_a_layer(QKV), needs_gpu=True
    ),
    "Mamba-2, fla": Rival(mamba_in_triton, mamba_inputs, needs_gpu=True),
}


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

    def available(self) -> float:
        """MiB that are left."""
        if self.device == "cuda":
            return torch.cuda.mem_get_info()[0] / 2**20
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def once(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call: by the clock on a GPU, CPU time on a CPU."""
    if device == "cpu":
        start = time.process_time()
        function()
        return 1e3 * (time.process_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, length: int, part: str, device: str, seconds: float) -> dict:
    """Median time and peak memory of one pass; or the reason why it was refused."""
    rival, memory, inputs = RIVALS[name], Memory(device), None
    try:
        inputs = rival.inputs(length, torch.bfloat16 if device == "cuda" else torch.float32, device)

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
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        return {"refused": first_line(error)}
    except Exception as error:
        if name.startswith("GMA"):
            raise  # ours may not refuse
        return {"refused": first_line(error)}


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
            last, title = before[name, part], f"{name}, {part}, {length}"
            reason = None
            if last is not None and title not in results.rows:
                reason = too_long(last, length, options.longest)
                if reason is None and options.device == "cpu":
                    reason = no_memory(last, length, Memory("cpu").available())
            if reason is not None:
                print(f"\n=== {title}\nnot tried: {reason}")
                before[name, part] = {"refused": reason}
                continue

            def row(name=name, part=part, length=length) -> dict:
                measured = measure(name, length, part, options.device, options.seconds)
                return {"rival": name, "pass": part, "length": length, **measured}

            measured = before[name, part] = results.measure(title, row)
            print(", ".join(f"{key} {measured[key]}" for key in ("ms", "peak_mib", "refused") if key in measured))


def check(device: str) -> None:
    """SystemExit if GMA does not compute what it should: a wrong operator has no speed."""
    if device == "cpu":
        check_correctness()
    else:
        for variant in ("normalised", "un-normalised, decay"):
            relative_error(variant, Shape(1, 4096, HEADS, DIM, COMPONENTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), help="default: all that run on the device")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--max_length", type=int, help="leave out longer ones")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds that one call may take")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; their times are added")
    parser.add_argument("--plot", action="store_true", help="draw the figure")
    add_output_options(parser, "scaling_*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.lengths = [length for length in options.lengths if length <= (options.max_length or max(options.lengths))]
    options.rivals = options.rivals or [
        name for name, rival in RIVALS.items() if options.device == "cuda" or not rival.needs_gpu
    ]
    if not options.table:
        if options.device == "cpu":
            options.output = options.output or Path("scaling_cpu.json")
            threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
            device = {"device": f"{cpu_model()}, {threads}", "dtype": "float32"}
        else:
            options.output = output_path(options)
            device = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16"}
        sizes = {"batch": 1, "heads": HEADS, "dim": DIM, "components": COMPONENTS}
        mamba = {"mamba2_heads": MAMBA_HEADS, "mamba2_state": MAMBA_STATE}
        check(options.device)
        measure_all(Results(options.output, "scaling", {**device, **sizes, **mamba}), options)
    for path in stored(options):
        content = json.loads(path.read_text())
        print(f"\n{path}\n\n{tables(content)}")
        if options.plot:
            plot(content, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
