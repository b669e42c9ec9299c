# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of Gaussian mixture attention beside softmax attention, on a CPU.

    python benchmarks/kernels/attention_cpu.py --threads 2

Rivals are measured in turns within one process, so that a busy machine slows all of them alike, and the fastest round
counts. Peak memory is what the resident set grows by at most, in a process per rival that does nothing else; it includes
inputs, outputs and gradients.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor

from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import markdown
from benchmarks.lib.timing import cpu_model, resident_memory, wall_time
from benchmarks.rivals import operators
from benchmarks.rivals.operators import Shape, evaluate, make_inputs


SHAPE = Shape(batch=1, length=0, heads=8)
TOLERANCE = 1e-5  # relative error of float32 against float64: some tens of roundings of 6e-8
NAMES = {"sdpa": "SDPA", "gma": "GMA normalised", "gma, decay": "GMA normalised, decay"}
RIVALS = {title: operators.RIVALS[name] for title, name in NAMES.items()}


def inputs_of(name: str, length: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a rival, and a gradient of its output."""
    shape = SHAPE._replace(length=length)
    inputs = make_inputs(RIVALS[name].names, shape, torch.float32, "cpu")
    inputs = {key: x.detach().to(dtype).requires_grad_() for key, x in inputs.items()}
    return inputs, operators.random_grad(shape, torch.float32, "cpu").to(dtype)


def check_correctness() -> float:
    """Largest relative error of outputs and gradients against the float64 reference, or SystemExit when too large."""
    worst = 0.0
    for name in ("gma", "gma, decay"):
        exact, found = (
            evaluate(operators.gma(RIVALS[name].names, operators.NORMALISED, backend), *inputs_of(name, 300, dtype))
            for dtype, backend in ((torch.float64, "reference"), (torch.float32, "chunked"))
        )
        worst = max(worst, *(((found[k].double() - x).norm() / x.norm()).item() for k, x in exact.items()))
    if not worst < TOLERANCE:
        sys.exit(f"error: chunked differs from the float64 reference by {worst:.1e}; no speed is reported.")
    return worst


def run(name: str, inputs: dict[str, Tensor], grad: Tensor, backward: bool) -> float:
    """Seconds of one evaluation."""
    if backward:
        return wall_time(lambda: evaluate(RIVALS[name], inputs, grad))
    with torch.no_grad():
        return wall_time(lambda: RIVALS[name].function(inputs))


def measure_speed(length: int, seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every rival, fastest of at least `rounds` interleaved rounds and about `seconds` seconds."""
    inputs = {name: inputs_of(name, length) for name in RIVALS}
    times = {(name, backward): [] for name in RIVALS for backward in (False, True)}
    for name, backward in times:
        run(name, *inputs[name], backward)  # warm-up
    while len(times["gma", True]) < rounds or sum(map(sum, times.values())) < seconds:
        for (name, backward), measured in times.items():
            measured.append(run(name, *inputs[name], backward))
    fields = {"forward_ms": False, "forward_backward_ms": True}
    return {name: {field: 1e3 * min(times[name, part]) for field, part in fields.items()} for name in RIVALS}


def print_peaks(name: str, lengths: list[int]) -> None:
    """Peak resident memory in MiB of forward and backward at every length, as one line of JSON."""
    run(name, *inputs_of(name, 64), True)
    base, peaks = resident_memory("VmRSS"), []
    for length in lengths:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run(name, *inputs_of(name, length), True)
        peaks.append(resident_memory("VmHWM") - base)
    print(json.dumps(peaks))


def measure_memory(name: str, lengths: list[int], threads: int) -> list[float]:
    """Peaks of `print_peaks` from a fresh process."""
    words = [sys.executable, __file__, "--probe", name, "--threads", str(threads), "--lengths", *map(str, lengths)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def markdown_table(rows: list[dict]) -> str:
    """The speed of forward and backward pass as the README shows it."""
    columns = ["tokens", "SDPA", "GMA", "speed-up", "GMA with forgetting", "speed-up", "peak memory SDPA / GMA"]
    lines = []
    for length in sorted({row["length"] for row in rows}):
        own = {row["rival"]: row for row in rows if row["length"] == length}
        softmax, gma, decay = (own[name] for name in RIVALS)
        times = [f"{row['forward_backward_ms']:,.0f} ms" for row in (softmax, gma, decay)]
        speed_ups = [f"{row['speed_up']:.1f}x" for row in (gma, decay)]
        memory = f"{softmax['peak_memory_mib']:.0f} / {gma['peak_memory_mib']:.0f} MiB"
        lines.append([f"{length:,}", times[0], times[1], speed_ups[0], times[2], speed_ups[1], memory])
    return markdown(columns, lines, left=0)


def measure(options: argparse.Namespace) -> None:
    setting = {"batch": 1, "heads": SHAPE.heads, "dim": SHAPE.dim, "components": SHAPE.components, "dtype": "float32"}
    setting |= {"device": cpu_model(), "threads": options.threads}
    results = Results(options.output, "kernels.attention_cpu", setting, one_device=True)
    results.report["relative_error"] = check_correctness()
    missing = [n for n in sorted(options.lengths) if not results.find(length=n)]
    memory = {name: measure_memory(name, missing, options.threads) for name in RIVALS if missing}
    for i, length in enumerate(missing):
        speeds = measure_speed(length, options.seconds, options.rounds)
        for name, speed in speeds.items():
            ratio = speeds["sdpa"]["forward_backward_ms"] / speed["forward_backward_ms"]
            values = {**speed, "speed_up": ratio, "peak_memory_mib": memory[name][i]}
            results.measure({"length": length, "rival": name}, values.copy)


def report(content: dict) -> str:
    rows = list(Results.of(content).rows.values())
    lost = {
        name: [row["length"] for row in rows if row["rival"] == name and row["speed_up"] < 1]
        for name in list(RIVALS)[1:]
    }
    faster = [f"SDPA is faster than {k} at N = {v or 'none of these'} (forward and backward)" for k, v in lost.items()]
    return "\n".join([markdown_table(rows), "", *faster])


def add_options(add) -> None:
    add("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=3, help="least number of rounds per length")
    add("--seconds", type=float, default=5.0, help="time to measure per length, if rounds are over")
    add("--probe", choices=list(RIVALS), help="only print the peak memory of this rival, as JSON")


def main() -> None:
    def start(options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        if options.probe:
            print_peaks(options.probe, sorted(options.lengths))
            sys.exit()
        measure(options)

    command(__doc__, "cpu_attention", add_options, start, report)


if __name__ == "__main__":
    main()
