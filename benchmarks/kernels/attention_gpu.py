# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed, memory and accuracy of Gaussian mixture attention on a GPU, beside FlashAttention and linear attention.

    python benchmarks/kernels/attention_gpu.py

65,536 tokens in all, 16 heads, dim 64, 64 components, causal, bfloat16, mixtures as after some training. Rivals are
PyTorch's SDPA, forced to its FlashAttention backend, and the operators of flash-linear-attention 0.6.0 where that is
installed (`pip install flash-linear-attention==0.6.0`); what one of them refuses to run stands in the results with its
reason. Forward passes run without autograd; backward passes give the gradients of everything, the mixture included. Before
a time is taken, output and gradients of the same call (with batch 1, and at most 65,536 tokens) are compared with float64.

Parts: `speed` at lengths 1k to 64k; `dims` with dimension 128, and with more components; `length`, the time per token from
2k to 512k tokens, also in a single sequence; `memory`, the peak beyond inputs, outputs and their gradients; `accuracy`
beside the `chunked` backend in the same dtype; `fla`, the speed of flash-linear-attention, which may tune itself for
minutes. What the output file holds already is not measured again without `--again`.
"""

import argparse
import math
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch

from benchmarks.kernels.attention_accuracy import CASES, DTYPES, measure_case
from benchmarks.kernels.attention_accuracy import SHAPE as ACCURACY_SHAPE
from benchmarks.lib.report import (
    Report,
    add_report_arguments,
    default_output,
    first_line,
    free_memory,
    median_time,
    print_table,
)
from benchmarks.rivals.operators import (
    CHUNKED,
    FLA,
    GMA,
    GMA_EXTREMES,
    RIVALS,
    SDPA,
    Rival,
    Shape,
    make_inputs,
    random_grad,
    relative_error,
)


TOKENS = 65536
LENGTHS = (1024, 2048, 4096, 8192, 16384, 65536)
CHUNKED_LENGTH = 4096  # the one length at which the slow `chunked` backend is measured
DIM_LENGTHS = (2048, 4096, 16384)
MORE_COMPONENTS = (128, 256)
FLAT_LENGTHS = tuple(2**n for n in range(11, 20))
SDPA_LONGEST = 65536
CHECKED_TOKENS = 65536  # longer calls are compared with float64 up to here: float64 needs four times the memory


def same_tokens(length: int, **sizes) -> Shape:
    """As many sequences as 65,536 tokens make, one if it is longer."""
    return Shape(max(1, TOKENS // length), length, **sizes)


def measure_time(rival: Rival, shape: Shape, seconds: float, forward: bool = True) -> dict:
    """Milliseconds of the forward pass (on request) and of forward and backward, as far as the rival runs at all."""
    inputs, grad, result = make_inputs(rival.names, shape, torch.bfloat16), random_grad(shape, torch.bfloat16), {}
    leaves = list(inputs.values())

    def infer():
        with torch.no_grad():
            rival.function(inputs)

    try:
        if forward:
            result["forward_ms"] = median_time(infer, seconds)
        result["forward_backward_ms"] = median_time(
            lambda: torch.autograd.grad(rival.function(inputs), leaves, grad), seconds
        )
    except Exception as error:  # whatever a rival refuses with is its result; ours may not refuse
        if rival in GMA.values():
            raise
        result["refused"] = first_line(error)
        torch.cuda.synchronize()  # raises where the GPU itself failed, and with it all that would follow
    return result


def time_into(report: Report, part: str, name: str, shape: Shape, seconds: float, forward: bool = True) -> dict:
    """The row of a rival, measured unless the report holds it already."""
    key = {"part": part, "rival": name, **shape._asdict()}
    if report.wants(**key):
        values = {}
        if name in GMA:
            checked = shape._replace(batch=1, length=min(shape.length, CHECKED_TOKENS))
            values["relative_error"] = relative_error(name.removeprefix("GMA "), checked)
        free_memory()
        values.update(measure_time(RIVALS[name], shape, seconds, forward))
        report.add(key, values)
    return report.rows(**key)[0]


def measure_speed(report: Report, seconds: float) -> None:
    for name in (*GMA, *SDPA, *CHUNKED):
        for length in LENGTHS if name not in CHUNKED else (CHUNKED_LENGTH,):
            time_into(report, "speed", name, same_tokens(length), seconds)


def measure_fla(report: Report, seconds: float) -> None:
    for name in FLA:
        for length in LENGTHS:
            if "forward_ms" not in time_into(report, "speed", name, same_tokens(length), seconds):
                break  # refused altogether: no other length would change that


def measure_dims(report: Report, seconds: float) -> None:
    for name in (*GMA_EXTREMES, *SDPA):
        for length in DIM_LENGTHS:
            time_into(report, "dims", name, same_tokens(length, dim=128), seconds)
    for name in GMA_EXTREMES:
        for components in MORE_COMPONENTS:
            time_into(report, "dims", name, same_tokens(4096, components=components), seconds)


def measure_length(report: Report, seconds: float) -> None:
    calls = [(name, same_tokens(length)) for name in GMA_EXTREMES for length in FLAT_LENGTHS]
    for name in (*GMA_EXTREMES, *SDPA):
        calls += [(name, Shape(batch=1, length=length)) for length in FLAT_LENGTHS if length <= SDPA_LONGEST]
    for name, shape in dict.fromkeys(calls):
        time_into(report, "length", name, shape, seconds, forward=False)


def peak_memory(rival: Rival, shape: Shape) -> dict:
    """Bytes that forward and backward need at most, beyond inputs, output and their gradients, and the share of these."""
    inputs, grad = make_inputs(rival.names, shape, torch.bfloat16), random_grad(shape, torch.bfloat16)
    leaves = list(inputs.values())

    def run():
        output = rival.function(inputs)
        return output, torch.autograd.grad(output, leaves, grad)

    run()  # workspaces of libraries are there for good
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, grads = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(x.nbytes for x in (output, *grads))
    necessary = results + sum(x.nbytes for x in (*leaves, grad))
    return {"extra_bytes": peak - results, "necessary_bytes": necessary, "share": (peak - results) / necessary}


def measure_memory(report: Report, seconds: float) -> None:
    shape = same_tokens(4096)
    for name in (*GMA, *SDPA):
        key = {"part": "memory", "rival": name, **shape._asdict()}
        if report.wants(**key):
            report.add(key, peak_memory(RIVALS[name], shape))


def measure_accuracy(report: Report, seconds: float) -> None:
    for dtype in DTYPES:
        for case in CASES:
            key = {"part": "accuracy", "case": case, "dtype": str(dtype).removeprefix("torch.")}
            if report.wants(**key):
                report.add(key, measure_case(case, dtype))


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def worst(values, select=max) -> float | None:
    """The largest (or smallest) of what was measured."""
    values = [value for value in values if value is not None]
    return select(values) if values else None


def microseconds_per_1000_tokens(row: dict) -> float:
    return 1e6 * row["forward_backward_ms"] / (row["batch"] * row["length"])


def flatness(report: Report, name: str) -> tuple[float | None, list[dict]]:
    """By how much the time per token of the slowest length exceeds that of the fastest, and the rows by length."""
    rows = [
        row
        for length in FLAT_LENGTHS
        for row in report.rows(part="length", rival=name, **same_tokens(length)._asdict())
    ]
    times = [microseconds_per_1000_tokens(row) for row in rows]
    return (max(times) / min(times) - 1 if len(times) > 1 else None), rows


def targets(report: Report) -> list[tuple[str, float | None, str, float]]:
    """What the kernels must reach: the worst of the variants counts. The times are meant for an H100."""

    def speed(field: str, name: str, length: int) -> float | None:
        return report.get(field, part="speed", rival=name, length=length)

    found = []
    for label, field, limit in (("forward", "forward_ms", 0.45), ("forward+backward", "forward_backward_ms", 2.3)):
        for name in GMA:
            slowest = worst(speed(field, name, length) for length in LENGTHS)
            found.append((f"{label} in ms, {name}, slowest length", slowest, "<=", limit))
    for length, limit in ((2048, 1.2), (4096, 2.0), (16384, 7.0)):
        for name in GMA:
            time, own = (speed("forward_backward_ms", rival, length) for rival in ("SDPA flash", name))
            found.append((f"SDPA time / time of {name}, N = {length}", ratio(time, own), ">=", limit))
    for length in DIM_LENGTHS:
        for name in GMA_EXTREMES:
            time, own = (
                report.get("forward_backward_ms", part="dims", rival=rival, dim=128, length=length)
                for rival in ("SDPA flash", name)
            )
            found.append((f"SDPA time / time of {name}, dim 128, N = {length}", ratio(time, own), ">=", 1.0))
    for rival in list(FLA)[1:]:  # the first has neither features nor normaliser: a bound, not a target
        for label, field in (("forward", "forward_ms"), ("forward+backward", "forward_backward_ms")):
            ratios = [ratio(speed(field, rival, n), speed(field, name, n)) for name in GMA for n in LENGTHS]
            found.append((f"{label} time of {rival} / GMA, worst", worst(ratios, min), ">=", 1.0))
    for name in GMA_EXTREMES:
        found.append((f"spread of the time per token over the length, {name}", flatness(report, name)[0], "<=", 0.1))
    for name in GMA:
        found.append((f"memory share, {name}", report.get("share", part="memory", rival=name), "<=", 0.2))
    ratios = [
        math.inf if row["worst_ratio"] is None else row["worst_ratio"]  # null: not a number
        for row in report.rows(part="accuracy")
    ]
    found.append(("error / error of chunked, worst", worst(ratios), "<=", 2.0))
    return found


def cell(row: dict | None, *fields: str) -> str:
    if row is None:
        return ""
    times = [f"{row[field]:.2f}" for field in fields if row.get(field) is not None]
    return " / ".join(times) if len(times) == len(fields) else " / ".join([*times, "refused"])


def print_tables(report: Report) -> None:
    """The measurements, a table per part."""

    def table(title: str, columns: list, key, names, fields=("forward_ms", "forward_backward_ms")) -> None:
        lines = {}
        for name in names:
            found = [report.rows(rival=name, **key(column)) for column in columns]
            if any(found):
                lines[name] = [cell(rows[0] if rows else None, *fields) for rows in found]
        if lines:
            print_table(title, columns, lines)

    table(
        "forward / forward+backward in ms by N",
        list(LENGTHS),
        lambda n: {"part": "speed", "length": n},
        [*GMA, *CHUNKED, *SDPA, *FLA],
    )
    table(
        "dim 128: forward / forward+backward in ms by N",
        list(DIM_LENGTHS),
        lambda n: {"part": "dims", "length": n, "dim": 128},
        [*GMA_EXTREMES, *SDPA],
    )
    table(
        "N = 4096: forward / forward+backward in ms by components",
        list(MORE_COMPONENTS),
        lambda n: {"part": "dims", "components": n},
        GMA_EXTREMES,
    )
    for title, shape in (
        ("65,536 tokens or one sequence: forward+backward, microseconds per 1,000 tokens", same_tokens),
        ("one sequence: forward+backward, microseconds per 1,000 tokens", lambda n: Shape(1, n)),
    ):
        lines = {}
        for name in (*GMA_EXTREMES, *SDPA):
            rows = [report.rows(part="length", rival=name, **shape(n)._asdict()) for n in FLAT_LENGTHS]
            cells = [
                f"{microseconds_per_1000_tokens(row[0]):.2f}" if row and "forward_backward_ms" in row[0] else ""
                for row in rows
            ]
            if any(cells):
                lines[name] = cells
        if lines:
            print_table(title, [f"{n // 1024}k" for n in FLAT_LENGTHS], lines)
    table(
        "peak memory beyond the necessary, as a share of it", [4096], lambda n: {"part": "memory"}, RIVALS, ["share"]
    )
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    accuracy = {
        case: [cell((report.rows(part="accuracy", case=case, dtype=d) or [None])[0], "worst_ratio") for d in dtypes]
        for case in CASES
    }
    if report.rows(part="accuracy"):
        print_table("largest error / error of chunked in the same dtype", dtypes, accuracy)


PARTS = {
    "speed": measure_speed,
    "dims": measure_dims,
    "length": measure_length,
    "memory": measure_memory,
    "accuracy": measure_accuracy,
    "fla": measure_fla,
}


def main() -> None:
    """Measure, print the tables and the targets; every measurement goes to the JSON file at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=0.2, help="per measurement, after half as long a warm-up")
    add_report_arguments(parser)
    options = parser.parse_args()
    output = options.output or default_output("gpu_attention")
    setting = {
        "dtype": "bfloat16",
        "tokens": TOKENS,
        **Shape(0, 0)._asdict(),
        "batch": "tokens / length, at least 1",
        "length": list(LENGTHS),
        "seconds": options.seconds,
        "accuracy": ACCURACY_SHAPE._asdict(),
    }
    report = Report(output, "kernels.attention_gpu", setting, options.again)
    for part in options.parts:
        print(f"{part}:", flush=True)
        PARTS[part](report, options.seconds)
    print_tables(report)
    report.print_targets(targets(report))


if __name__ == "__main__":
    main()
