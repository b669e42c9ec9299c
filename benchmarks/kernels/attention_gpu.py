# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed, memory and accuracy of Gaussian mixture attention on a GPU, beside softmax attention and linear attention.

    python benchmarks/kernels/attention_gpu.py
    python benchmarks/kernels/attention_gpu.py --renew --output benchmarks/results/gpu_attention_h200.json

65,536 tokens in all, 16 heads, dim 64, 64 components, causal, bfloat16, mixtures as after some training. Rivals, all measured in
the same run: PyTorch's `scaled_dot_product_attention` as users call it (cuDNN on Hopper), the same forced to FlashAttention-2,
and the operators of flash-linear-attention where that is installed (`pip install flash-linear-attention==0.6.0`); what a rival
refuses to run is kept with its reason. Forward passes run without autograd; backward passes give the gradients of everything,
the mixture included. Before times are taken, output and gradients of GMA are compared with float64.

Parts: `speed` at lengths 1k to 64k; `dims` with dimension 128, and with more components; `length`, the time per token from
2k to 512k tokens, also in a single sequence; `host`, the wall time of a call of one short sequence, Python and launches
included; `memory`, the peak beyond inputs, outputs and their gradients; `accuracy` beside the `chunked` backend in the same
dtype; `fla`, the kernels of flash-linear-attention that need minutes to tune themselves (not measured by default).
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch

from benchmarks.kernels.attention_accuracy import CASES, DTYPES, measure_case
from benchmarks.kernels.attention_accuracy import SHAPE as ACCURACY_SHAPE
from benchmarks.lib.results import Results, add_output_options, need_gpu, output_path, stored
from benchmarks.lib.tables import markdown, pivot
from benchmarks.lib.timing import first_line, free_memory, median_time, peak_bytes
from benchmarks.rivals.operators import (
    CHUNKED,
    FLA,
    GMA,
    GMA_EXTREMES,
    RIVALS,
    SDPA,
    TITLES,
    VARIANTS,
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
HOST_LENGTHS = (128, 2048, 8192)
CHECKED_LENGTHS = (2048, 16384)  # one pass over the tokens, and two
FAST_FLA, SLOW_FLA = list(FLA)[:1] + list(FLA)[2:4], [list(FLA)[1], list(FLA)[4]]
FIELDS = {"forward_ms": "forward", "forward_backward_ms": "forward and backward"}


def same_tokens(length: int, **sizes) -> Shape:
    """As many sequences as 65,536 tokens make, one if it is longer."""
    return Shape(max(1, TOKENS // length), length, **sizes)


def measure_time(name: str, shape: Shape, seconds: float, forward: bool = True) -> dict:
    """Milliseconds of the forward pass (on request) and of forward and backward, as far as the rival runs at all."""
    rival, result = RIVALS[name], {}
    free_memory()
    inputs, grad = make_inputs(rival.names, shape, torch.bfloat16), random_grad(shape, torch.bfloat16)
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
        if name in GMA:
            raise
        result["refused"] = first_line(error)
        torch.cuda.synchronize()  # raises where the GPU itself failed, and with it all that would follow
    return result


def time_into(results: Results, part: str, name: str, shape: Shape, seconds: float, forward: bool = True) -> dict:
    key = {"part": part, "rival": name, **shape._asdict()}
    return results.measure(key, lambda: measure_time(name, shape, seconds, forward))


def measure_speed(results: Results, seconds: float) -> None:
    for variant in VARIANTS:
        for length in CHECKED_LENGTHS:
            key = {"part": "check", "rival": f"GMA {variant}", "length": length}
            results.measure(key, lambda v=variant, n=length: {"relative_error": relative_error(v, Shape(1, n))})
    for name in (*GMA, *SDPA, *CHUNKED):
        for length in LENGTHS if name not in CHUNKED else (CHUNKED_LENGTH,):
            time_into(results, "speed", name, same_tokens(length), seconds)
    measure_fla(results, seconds, FAST_FLA)


def measure_fla(results: Results, seconds: float, names: list[str] = SLOW_FLA) -> None:
    for name in names:
        for length in LENGTHS:
            if "forward_ms" not in time_into(results, "speed", name, same_tokens(length), seconds):
                break  # refused altogether: no other length would change that


def measure_dims(results: Results, seconds: float) -> None:
    for name in (*GMA_EXTREMES, *SDPA):
        for length in DIM_LENGTHS:
            time_into(results, "dims", name, same_tokens(length, dim=128), seconds)
    for name in GMA_EXTREMES:
        for components in MORE_COMPONENTS:
            time_into(results, "dims", name, same_tokens(4096, components=components), seconds)


def measure_length(results: Results, seconds: float) -> None:
    calls = [(name, same_tokens(length)) for name in GMA_EXTREMES for length in FLAT_LENGTHS]
    for name in (*GMA_EXTREMES, *SDPA):
        calls += [(name, Shape(batch=1, length=length)) for length in FLAT_LENGTHS if length <= SDPA_LONGEST]
    for name, shape in dict.fromkeys(calls):
        time_into(results, "length", name, shape, seconds, forward=False)


def wall_time(name: str, shape: Shape, seconds: float) -> dict:
    """Milliseconds by the clock of one call after another, Python and launches included."""
    rival = RIVALS[name]
    inputs, grad = make_inputs(rival.names, shape, torch.bfloat16), random_grad(shape, torch.bfloat16)

    def infer():
        with torch.no_grad():
            rival.function(inputs)

    def train():
        torch.autograd.grad(rival.function(inputs), list(inputs.values()), grad)

    result = {}
    for field, function in zip(FIELDS, (infer, train), strict=True):
        for _ in range(5):
            function()
        torch.cuda.synchronize()
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(10):
                function()
            torch.cuda.synchronize()
            calls += 10
        result[field] = 1e3 * (time.perf_counter() - start) / calls
    return result


def measure_host(results: Results, seconds: float) -> None:
    for name in (*GMA_EXTREMES, "SDPA"):
        for length in HOST_LENGTHS:
            shape = Shape(1, length, heads=8)
            key = {"part": "host", "rival": name, **shape._asdict()}
            results.measure(key, lambda name=name, shape=shape: wall_time(name, shape, seconds))


def peak_memory(name: str, shape: Shape) -> dict:
    """Bytes that forward and backward need at most, beyond inputs, output and their gradients, and the share of these."""
    rival = RIVALS[name]
    inputs, grad = make_inputs(rival.names, shape, torch.bfloat16), random_grad(shape, torch.bfloat16)
    leaves = list(inputs.values())

    def run():
        output = rival.function(inputs)
        return output, torch.autograd.grad(output, leaves, grad)

    run()  # workspaces of libraries are there for good
    free_memory()
    before = torch.cuda.memory_allocated()
    (output, grads), peak = peak_bytes(run)
    results = sum(x.nbytes for x in (output, *grads))
    necessary = results + sum(x.nbytes for x in (*leaves, grad))
    extra = peak - before - results
    return {"extra_bytes": extra, "necessary_bytes": necessary, "share": extra / necessary}


def measure_memory(results: Results, seconds: float) -> None:
    shape = same_tokens(4096)
    for name in (*GMA, *SDPA):
        key = {"part": "memory", "rival": name, **shape._asdict()}
        results.measure(key, lambda name=name: peak_memory(name, shape))


def measure_accuracy(results: Results, seconds: float) -> None:
    for dtype in DTYPES:
        for case in CASES:
            key = {"part": "accuracy", "case": case, "dtype": str(dtype).removeprefix("torch.")}
            results.measure(key, lambda case=case, dtype=dtype: measure_case(case, dtype))


PARTS = {
    "speed": measure_speed,
    "dims": measure_dims,
    "length": measure_length,
    "host": measure_host,
    "memory": measure_memory,
    "accuracy": measure_accuracy,
    "fla": measure_fla,
}


def softmax_rival(results: Results) -> str:
    """The rival: SDPA as users call it; FlashAttention-2 in results from before both were measured."""
    return "SDPA" if results.find(part="speed", rival="SDPA") else "SDPA flash"


def rival_note(content: dict) -> str:
    """What to know about results in which the rival, SDPA as users call it, was not measured."""
    if softmax_rival(Results.of(content)) == "SDPA":
        return ""
    return (
        "**To know:** SDPA was forced to FlashAttention-2 in this run. Its default was not measured; on Hopper that is cuDNN, "
        "which is faster, so GMA is less far ahead of it than the tables of this device say."
    )


def summary(content: dict) -> str:
    """Forward and backward pass by length, as the README shows it."""
    results = Results.of(content)

    def ms(name: str, length: int) -> float | None:
        return results.get("forward_backward_ms", part="speed", rival=name, length=length)

    softmax = softmax_rival(results)
    others = [name for name in (*SDPA, "fla chunk_linear_attn") if any(ms(name, n) for n in LENGTHS)]
    own = dict(zip(GMA_EXTREMES, ("GMA", "GMA with forgetting"), strict=True))
    ratio = "SDPA / {}" if softmax == "SDPA" else "FlashAttention-2 / {}"
    columns = ["tokens of a sequence", *(TITLES.get(name, name) for name in others)]
    columns += [column for title in own.values() for column in (title, ratio.format(title))]
    rows = []
    for length in LENGTHS:
        times = {name: ms(name, length) for name in (*others, *own)}
        row = [f"{length:,}", *("" if times[name] is None else f"{times[name]:.1f} ms" for name in others)]
        for name in own:
            both = times[name] is not None and times.get(softmax) is not None
            row += ["" if times[name] is None else f"{times[name]:.1f} ms"]
            row += [f"{times[softmax] / times[name]:.1f}x" if both else ""]
        if any(row[1:]):
            rows.append(row)
    return markdown(columns, rows)


def span(values: list[float]) -> str:
    low, high = (f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def comparison(content: dict) -> str:
    """Two tables: where GMA takes less time than a rival, and where it takes more."""
    results = Results.of(content)
    ahead, behind = [], []
    for own in GMA_EXTREMES:
        for rival in (*SDPA, *FLA):
            for field, title in FIELDS.items():
                for part, dim, lengths in (("speed", 64, LENGTHS), ("dims", 128, DIM_LENGTHS)):
                    key = {"part": part, "dim": dim}
                    times = {
                        n: [results.get(field, rival=name, length=n, **key) for name in (rival, own)] for n in lengths
                    }
                    ratios = {n: pair[0] / pair[1] for n, pair in times.items() if None not in pair}
                    what = title if dim == 64 else f"{title}, dimension 128"
                    for table, chosen in (
                        (ahead, {n: x for n, x in ratios.items() if x >= 1}),
                        (behind, {n: 1 / x for n, x in ratios.items() if x < 1}),
                    ):
                        if chosen:
                            where = ", ".join(f"{n:,}" for n in chosen)
                            table.append([own, TITLES.get(rival, rival), what, where, span(list(chosen.values()))])
    columns = ["", "beside", "pass", "tokens of a sequence"]
    parts = []
    if ahead:
        parts += ["Where GMA is ahead:", markdown([*columns, "times as fast"], ahead, left=4)]
    if behind:
        parts += ["Where others are ahead:", markdown([*columns, "GMA's time in theirs"], behind, left=4)]
    return "\n\n".join([*parts, properties(results)]).strip()


def properties(results: Results) -> str:
    """Time per token, memory and accuracy, whoever else there is."""
    lines = []
    for name in GMA_EXTREMES:
        rows = [results.find(part="length", rival=name, **same_tokens(n)._asdict()) for n in FLAT_LENGTHS]
        times = [per_1000_tokens(row[0]) for row in rows if row]
        if len(times) > 1:
            lines.append(
                [f"{name}: longest time per token in the shortest, 2k to 512k", f"{max(times) / min(times):.2f}"]
            )
    for name in GMA:
        share = results.get("share", part="memory", rival=name)
        if share is not None:
            lines.append([f"{name}: peak memory beyond the necessary", f"{share:.0%}"])
    worst = [(row["worst_ratio"], row["case"], row["dtype"]) for row in results.find(part="accuracy")]
    for is_extreme in (False, True):
        chosen = [x for x in worst if (x[1] in ("plain", "gated") or x[1].startswith("padding")) != is_extreme]
        if chosen:
            value, case, dtype = max((x for x in chosen if x[0] is not None), default=chosen[0])
            kind = "extreme inputs" if is_extreme else "ordinary inputs"
            lines.append([f"largest error in that of `chunked`, {kind} ({case}, {dtype})", f"{value:.1f}"])
    return markdown(["of GMA itself", ""], lines) if lines else ""


def per_1000_tokens(row: dict) -> float:
    """Microseconds of forward and backward pass."""
    return 1e6 * row["forward_backward_ms"] / (row["batch"] * row["length"])


def tables(content: dict) -> str:
    """The measurements, a table per part, in plain text."""
    results, found = Results.of(content), []

    def table(title: str, columns, key, names, show=None) -> None:
        def cell(name: str, column) -> str:
            rows = results.find(rival=name, **key(column))
            return (show or times)(rows[0]) if rows else ""

        found.extend(pivot(title, columns, {name: TITLES.get(name, name) for name in names}, cell))

    def times(row: dict) -> str:
        known = [f"{row[field]:.2f}" for field in FIELDS if row.get(field) is not None]
        return " / ".join(known if len(known) == len(FIELDS) else [*known, "refused"])

    def per_token(row: dict) -> str:
        return f"{per_1000_tokens(row):.2f}" if "forward_backward_ms" in row else ""

    ours, title = [*GMA_EXTREMES, *SDPA], "forward / forward+backward in ms by"
    every = [*GMA, *CHUNKED, *SDPA, *FLA]
    table(f"{title} N", LENGTHS, lambda n: {"part": "speed", "length": n}, every)
    table(f"dim 128: {title} N", DIM_LENGTHS, lambda n: {"part": "dims", "length": n, "dim": 128}, ours)
    table(f"N = 4096: {title} components", MORE_COMPONENTS, lambda n: {"part": "dims", "components": n}, GMA_EXTREMES)
    title = "forward+backward, microseconds per 1,000 tokens"
    for what, shape in (("65,536 tokens or one sequence", same_tokens), ("one sequence", lambda n: Shape(1, n))):
        lengths = {f"{n // 1024}k": shape(n)._asdict() for n in FLAT_LENGTHS}
        key = partial(lambda name, lengths: {"part": "length", **lengths[name]}, lengths=lengths)
        table(f"{what}: {title}", list(lengths), key, ours, per_token)
    title = "one sequence of 8 heads: wall time of a call, forward / forward+backward in ms by N"
    table(title, HOST_LENGTHS, lambda n: {"part": "host", "length": n}, ours)
    title = "peak memory beyond the necessary, as a share of it"
    table(title, [4096], lambda n: {"part": "memory"}, RIVALS, lambda row: f"{row['share']:.2f}")

    def ratio(case: str, dtype: str) -> str:
        worst = results.get("worst_ratio", part="accuracy", case=case, dtype=dtype)
        return "" if worst is None else f"{worst:.2f}"

    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    title = "largest error / error of chunked in the same dtype"
    return "\n\n".join([*found, *pivot(title, dtypes, {case: case for case in CASES}, ratio)])


def main() -> None:
    """Measure and print the tables; every measurement goes to the JSON file at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=[name for name in PARTS if name != "fla"])
    parser.add_argument("--seconds", type=float, default=0.15, help="per measurement, after half as long a warm-up")
    add_output_options(parser, "gpu_attention_*")
    options = parser.parse_args()
    if not options.table:
        need_gpu()
        setting = {
            "dtype": "bfloat16",
            "tokens": TOKENS,
            **Shape(0, 0)._asdict(),
            "batch": "tokens / length, at least 1",
            "length": list(LENGTHS),
            "seconds": options.seconds,
            "accuracy": ACCURACY_SHAPE._asdict(),
        }
        options.output = output_path(options)
        results = Results(options.output, "kernels.attention_gpu", setting, one_device=True)
        for part in options.parts:
            PARTS[part](results, options.seconds)
    for path in stored(options):
        content = json.loads(path.read_text())
        print(f"\n{path}\n\n{tables(content)}\n\n{summary(content)}\n\n{comparison(content)}")


if __name__ == "__main__":
    main()
