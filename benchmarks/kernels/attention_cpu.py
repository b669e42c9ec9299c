# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of Gaussian mixture attention beside softmax attention, on a CPU.

    python benchmarks/kernels/attention_cpu.py --threads 2

Rivals are measured in turns within one process, so that a busy machine slows all of them alike, and the fastest round
counts. Peak memory is what the resident set grows by at most, in a process per rival that does nothing else; it includes
inputs, outputs and gradients.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F

from gma_hf.ops import gaussian_mixture_attention


HEADS, DIM, COMPONENTS = 8, 64, 64
TOLERANCE = 1e-5  # relative error of float32 against float64: some tens of roundings of 6e-8


def make_inputs(length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random inputs of one layer; the mixture as at the start of training, decays and weights as in a gated block."""
    torch.manual_seed(length)
    inputs = {name: torch.randn(1, HEADS, length, DIM) for name in ("query", "key", "value")}
    inputs["means"] = torch.randn(HEADS, COMPONENTS, DIM)
    inputs["raw_variances"] = torch.zeros(HEADS, COMPONENTS, DIM)
    inputs["prior_logits"] = torch.zeros(HEADS, COMPONENTS)
    inputs["write_weight"] = torch.rand(1, HEADS, length) * 0.1
    inputs["log_decay"] = -torch.rand(1, HEADS, length) * 0.1 * torch.linspace(1, 16, HEADS).view(1, HEADS, 1)
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


QKV = ("query", "key", "value")
MIXTURE = ("means", "raw_variances", "prior_logits")
GATES = ("write_weight", "log_decay")
# Name of the rival: what it computes, and which inputs it uses.
RIVALS = {
    "sdpa": (lambda x: F.scaled_dot_product_attention(x["query"], x["key"], x["value"], is_causal=True), QKV),
    "gma": (lambda x: gaussian_mixture_attention(**x, backend="chunked"), QKV + MIXTURE),
    "gma, decay": (lambda x: gaussian_mixture_attention(**x, backend="chunked"), QKV + MIXTURE + GATES),
}


def check_correctness() -> float:
    """Largest relative error of outputs and gradients against the float64 reference, or SystemExit when too large."""
    worst = 0.0
    for name in ("gma", "gma, decay"):
        results = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "chunked")):
            inputs = {key: x for key, x in make_inputs(300, dtype).items() if key in RIVALS[name][1]}
            output = gaussian_mixture_attention(**inputs, backend=backend)
            torch.manual_seed(0)
            grad = torch.randn(output.shape).to(dtype)
            results.append([output, *torch.autograd.grad(output, list(inputs.values()), grad)])
        for expected, actual in zip(*results, strict=True):
            worst = max(worst, ((actual.double() - expected).norm() / expected.norm()).item())
    if not worst < TOLERANCE:
        raise SystemExit(f"chunked differs from the float64 reference by {worst:.1e}; no speed is reported.")
    return worst


def run(name: str, inputs: dict[str, Tensor], grad: Tensor, backward: bool) -> float:
    """Seconds of one evaluation."""
    function, names = RIVALS[name]
    used = {key: inputs[key] for key in names}
    start = time.perf_counter()
    if backward:
        torch.autograd.grad(function(used), list(used.values()), grad)
    else:
        with torch.no_grad():
            function(used)
    return time.perf_counter() - start


def measure_speed(length: int, seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every rival, fastest of at least `rounds` interleaved rounds and about `seconds` seconds."""
    inputs, grad = make_inputs(length), torch.randn(1, HEADS, length, DIM)
    times = {(name, backward): [] for name in RIVALS for backward in (False, True)}
    for name, backward in times:
        run(name, inputs, grad, backward)  # warm-up
    start = time.perf_counter()
    while len(times["gma", True]) < rounds or time.perf_counter() - start < seconds:
        for (name, backward), measured in times.items():
            measured.append(run(name, inputs, grad, backward))
    return {
        name: {"forward_ms": 1e3 * min(times[name, False]), "forward_backward_ms": 1e3 * min(times[name, True])}
        for name in RIVALS
    }


def resident_memory(field: str) -> float:
    """MiB of resident memory of this process: VmRSS now, VmHWM at most since the mark was reset (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")


def print_peaks(name: str, lengths: list[int]) -> None:
    """Peak resident memory in MiB of forward and backward at every length, as one line of JSON."""
    run(name, make_inputs(64), torch.randn(1, HEADS, 64, DIM), True)
    base = resident_memory("VmRSS")
    peaks = []
    for length in lengths:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run(name, make_inputs(length), torch.randn(1, HEADS, length, DIM), True)
        peaks.append(resident_memory("VmHWM") - base)
    print(json.dumps(peaks))


def measure_memory(name: str, lengths: list[int], threads: int) -> list[float]:
    """Peaks of `print_peaks` from a fresh process."""
    command = [sys.executable, __file__, "--probe", name, "--threads", str(threads), "--lengths", *map(str, lengths)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def cpu_model() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def markdown_table(rows: list[dict]) -> str:
    """The speed of forward and backward pass as the README shows it."""
    lines = [
        "| tokens | SDPA | GMA | speed-up | GMA with forgetting | speed-up | peak memory SDPA / GMA |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for length in sorted({row["length"] for row in rows}):
        own = {row["rival"]: row for row in rows if row["length"] == length}
        sdpa, gma, decay = (own[name] for name in ("sdpa", "gma", "gma, decay"))
        lines.append(
            f"| {length:,} | {sdpa['forward_backward_ms']:,.0f} ms | {gma['forward_backward_ms']:,.0f} ms | "
            f"{gma['speed_up']:.1f}x | {decay['forward_backward_ms']:,.0f} ms | {decay['speed_up']:.1f}x | "
            f"{sdpa['peak_memory_mib']:.0f} / {gma['peak_memory_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="least number of rounds per length")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure per length, if rounds are over")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "cpu_attention.json")
    parser.add_argument("--probe", choices=list(RIVALS), help="only print the peak memory of this rival, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = sorted(options.lengths)
    if options.probe:
        print_peaks(options.probe, lengths)
        return

    error = check_correctness()
    print(f"chunked agrees with the float64 reference: largest relative error {error:.1e}, gradients included\n")
    memory = {name: measure_memory(name, lengths, options.threads) for name in RIVALS}
    print(f"causal, batch 1, {HEADS} heads, dim {DIM}, {COMPONENTS} components, float32, {options.threads} threads")
    print(f"{'N':>6}  {'rival':<11}{'fwd ms':>10}{'fwd+bwd ms':>12}{'speed-up':>10}{'peak MiB':>10}")
    rows, slower = [], []
    for i, length in enumerate(lengths):
        speeds = measure_speed(length, options.seconds, options.rounds)
        for name, speed in speeds.items():
            ratio = speeds["sdpa"]["forward_backward_ms"] / speed["forward_backward_ms"]
            rows.append(
                {"length": length, "rival": name, **speed, "speed_up": ratio, "peak_memory_mib": memory[name][i]}
            )
            print(
                f"{length:>6}  {name:<11}{speed['forward_ms']:>10.1f}{speed['forward_backward_ms']:>12.1f}"
                f"{ratio:>9.2f}x{memory[name][i]:>10.1f}",
                flush=True,
            )
            if ratio < 1:
                slower.append((name, length))
    for name in ("gma", "gma, decay"):
        lost = [length for rival, length in slower if rival == name]
        print(f"SDPA is faster than {name} at N = {lost if lost else 'none of these'} (forward and backward)")

    arguments = [
        f"--threads {options.threads} --seconds {options.seconds:g}",
        f"--lengths {' '.join(map(str, lengths))}",
    ]
    report = {
        "command": " ".join(["python benchmarks/kernels/attention_cpu.py", *arguments]),
        "date": datetime.date.today().isoformat(),
        "device": cpu_model(),
        "threads": options.threads,
        "torch": torch.__version__,
        "setting": {"batch": 1, "heads": HEADS, "dim": DIM, "components": COMPONENTS, "dtype": "float32"},
        "relative_error": error,
        "sdpa_faster": [{"rival": name, "length": length} for name, length in slower],
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.output}\n\n{markdown_table(rows)}")


if __name__ == "__main__":
    main()
