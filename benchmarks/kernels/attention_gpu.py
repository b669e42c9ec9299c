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
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch

from benchmarks.kernels import attention_accuracy as accuracy
from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import markdown, pivot
from benchmarks.lib.timing import first_line, free_memory, median_time, peak_bytes, wall_time
from benchmarks.rivals import operators
from benchmarks.rivals.operators import CHUNKED, FLA, GMA, GMA_EXTREMES, RIVALS, SDPA, TITLES, VARIANTS, Shape


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
PARTS = ("speed", "dims", "length", "host", "memory", "accuracy", "fla")


def same_tokens(length: int, **sizes) -> Shape:
    """As many sequences as 65,536 tokens make, one if it is longer."""
    return Shape(max(1, TOKENS // length), length, **sizes)


def passes(name: str, shape: Shape) -> dict[str, Callable[[], object]]:
    """The forward pass without autograd, and forward and backward pass for the gradients of everything."""
    rival, grad = RIVALS[name], operators.random_grad(shape, torch.bfloat16)
    inputs = operators.make_inputs(rival.names, shape, torch.bfloat16)

    def train() -> tuple:
        output = rival.function(inputs)
        return output, torch.autograd.grad(output, list(inputs.values()), grad)

    return {"forward_ms": torch.no_grad()(lambda: rival.function(inputs)), "forward_backward_ms": train}


def time_of(name: str, shape: Shape, seconds: float, fields: tuple[str, ...] = tuple(FIELDS)) -> dict:
    """Milliseconds of the passes, as far as the rival runs at all."""
    free_memory()
    functions, result = passes(name, shape), {}
    try:
        for field in fields:
            result[field] = median_time(functions[field], seconds)
    except Exception as error:  # whatever a rival refuses with is its result; ours may not refuse
        if name in GMA:
            raise
        result["refused"] = first_line(error)
        torch.cuda.synchronize()  # raises where the GPU itself failed, and with it all that would follow
    return result


def host_time(name: str, shape: Shape, seconds: float) -> dict:
    """Milliseconds by the clock of one call after another, Python and launches included."""
    result = {}
    for field, function in passes(name, shape).items():
        for _ in range(5):
            function()
        spent, calls = 0.0, 0
        while spent < seconds:
            spent += wall_time(lambda function=function: [function() for _ in range(10)])
            calls += 10
        result[field] = 1e3 * spent / calls
    return result


def peak_memory(name: str, shape: Shape) -> dict:
    """Bytes that forward and backward need at most, beyond inputs, output and their gradients, and the share of these."""
    run = passes(name, shape)["forward_backward_ms"]
    run()  # workspaces of libraries are there for good
    free_memory()
    before = torch.cuda.memory_allocated()
    (output, grads), peak = peak_bytes(run)
    results = sum(x.nbytes for x in (output, *grads))
    necessary = 2 * results  # inputs and the gradient that comes in are as large
    extra = peak - before - results
    return {"extra_bytes": extra, "necessary_bytes": necessary, "share": extra / necessary}


def calls(part: str, seconds: float) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """The rows of a part: what names a row, and what measures it."""
    measure, options = time_of, {"seconds": seconds}
    if part == "speed":
        for variant, length in itertools.product(VARIANTS, CHECKED_LENGTHS):
            key = {"part": "check", "rival": f"GMA {variant}", "length": length}
            yield key, partial(operators.measure_error, variant, Shape(1, length))
        shapes = [(name, same_tokens(n)) for name in (*GMA, *SDPA) for n in LENGTHS]
        shapes += [(name, same_tokens(CHUNKED_LENGTH)) for name in CHUNKED]
        shapes += [(name, same_tokens(n)) for name in FAST_FLA for n in LENGTHS]
    elif part == "fla":
        part, shapes = "speed", [(name, same_tokens(n)) for name in SLOW_FLA for n in LENGTHS]
    elif part == "dims":
        shapes = [(name, same_tokens(n, dim=128)) for name in (*GMA_EXTREMES, *SDPA) for n in DIM_LENGTHS]
        shapes += [(name, same_tokens(4096, components=n)) for name in GMA_EXTREMES for n in MORE_COMPONENTS]
    elif part == "length":
        shapes = [(name, same_tokens(n)) for name in GMA_EXTREMES for n in FLAT_LENGTHS]
        short = [n for n in FLAT_LENGTHS if n <= SDPA_LONGEST]
        shapes += [(name, Shape(batch=1, length=n)) for name in (*GMA_EXTREMES, *SDPA) for n in short]
        options["fields"] = ("forward_backward_ms",)
    elif part == "host":
        measure = host_time
        shapes = [(name, Shape(1, n, heads=8)) for name in (*GMA_EXTREMES, "SDPA") for n in HOST_LENGTHS]
    elif part == "memory":
        measure, options, shapes = peak_memory, {}, [(name, same_tokens(4096)) for name in (*GMA, *SDPA)]
    else:
        for dtype, case in itertools.product(accuracy.DTYPES, accuracy.CASES):
            yield {"part": part, "case": case, "dtype": named(dtype)}, partial(accuracy.measure_case, case, dtype)
        return
    for name, shape in dict.fromkeys(shapes):
        yield {"part": part, "rival": name, **shape._asdict()}, partial(measure, name, shape, **options)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    times = {
        (row["rival"], row["length"]): row["forward_backward_ms"]
        for row in results.find(part="speed") if row.get("forward_backward_ms") is not None
    }  # fmt: skip
    softmax = softmax_rival(results)
    others = [name for name in (*SDPA, "fla chunk_linear_attn") if any((name, n) in times for n in LENGTHS)]
    titles = zip(GMA_EXTREMES, ("GMA", "GMA with forgetting", "GMA correlated"), strict=True)
    own = {name: title for name, title in titles if any((name, n) in times for n in LENGTHS)}
    beside = "SDPA" if softmax == "SDPA" else "FlashAttention-2"
    columns = ["tokens of a sequence", *(TITLES.get(name, name) for name in others)]
    columns += [column for title in own.values() for column in (title, f"{beside} / {title}")]

    def shown(name: str, length: int) -> str:
        return f"{times[name, length]:.1f} ms" if (name, length) in times else ""

    def ratio(name: str, length: int) -> str:
        both = (name, length) in times and (softmax, length) in times
        return f"{times[softmax, length] / times[name, length]:.1f}x" if both else ""

    rows = [
        [f"{n:,}", *(shown(name, n) for name in others), *(show(name, n) for name in own for show in (shown, ratio))]
        for n in LENGTHS
    ]
    return markdown(columns, [row for row in rows if any(row[1:])])


def span(values: Collection[float]) -> str:
    low, high = (f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def comparison(content: dict) -> str:
    """Two tables: where GMA takes less time than a rival, and where it takes more."""
    results = Results.of(content)
    ahead, behind = [], []
    parts = (("speed", 64, LENGTHS, ""), ("dims", 128, DIM_LENGTHS, ", dimension 128"))
    for own, rival, (field, title), (part, dim, lengths, behind_title) in itertools.product(
        GMA_EXTREMES, (*SDPA, *FLA), FIELDS.items(), parts
    ):
        key = {"field": field, "part": part, "dim": dim}
        pairs = {n: [results.get(rival=name, length=n, **key) for name in (rival, own)] for n in lengths}
        ratios = {n: pair[0] / pair[1] for n, pair in pairs.items() if None not in pair}
        faster = {n: x for n, x in ratios.items() if x >= 1}
        slower = {n: 1 / x for n, x in ratios.items() if x < 1}
        for table, chosen in ((ahead, faster), (behind, slower)):
            if chosen:
                where = ", ".join(f"{n:,}" for n in chosen)
                table.append([own, TITLES.get(rival, rival), title + behind_title, where, span(chosen.values())])
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
            ratio = max(times) / min(times)
            lines.append([f"{name}: longest time per token in the shortest, 2k to 512k", f"{ratio:.2f}"])
    for row in results.find(part="memory"):
        if row["rival"] in GMA:
            lines.append([f"{row['rival']}: peak memory beyond the necessary", f"{row['share']:.0%}"])
    worst = [(row["worst_ratio"], row["case"], row["dtype"]) for row in results.find(part="accuracy")]
    for kind in ("ordinary inputs", "extreme inputs"):
        chosen = [x for x in worst if (x[1] in accuracy.ORDINARY) == kind.startswith("ordinary")]
        if chosen:
            value, case, dtype = max((x for x in chosen if x[0] is not None), default=chosen[0])
            lines.append([f"largest error in that of `chunked`, {kind} ({case}, {dtype})", f"{value:.1f}"])
    return markdown(["of GMA itself", ""], lines) if lines else ""


def per_1000_tokens(row: dict) -> float:
    """Microseconds of forward and backward pass."""
    return 1e6 * row["forward_backward_ms"] / (row["batch"] * row["length"])


def tables(content: dict) -> str:
    """The measurements, a table per part, in plain text."""
    results = Results.of(content)

    def times(row: dict) -> str:
        known = [f"{row[field]:.2f}" for field in FIELDS if row.get(field) is not None]
        return " / ".join(known if len(known) == len(FIELDS) else [*known, "refused"])

    def per_token(row: dict) -> str:
        return f"{per_1000_tokens(row):.2f}" if "forward_backward_ms" in row else ""

    def share(row: dict) -> str:
        return f"{row['share']:.2f}"

    def ratio(row: dict) -> str:
        return "" if row["worst_ratio"] is None else f"{row['worst_ratio']:.2f}"

    def table(title: str, rows: list[dict], columns, names, column="length", show=times, line="rival") -> list[str]:
        cells = {(row[line], row[column]): show(row) for row in rows}
        return pivot(title, columns, {name: TITLES.get(name, name) for name in names}, cells)

    ours, title = [*GMA_EXTREMES, *SDPA], "forward / forward+backward in ms by"
    per_1000 = "forward+backward, microseconds per 1,000 tokens"
    lengths = {n: f"{n // 1024}k" for n in FLAT_LENGTHS}
    flat = [{**row, "column": lengths[row["length"]]} for row in results.find(part="length")]
    one = [row for row in flat if row["batch"] == 1]
    spread = [row for row in flat if row["batch"] == same_tokens(row["length"]).batch]
    dims, host = results.find(part="dims"), results.find(part="host")
    dtypes, cases = map(named, accuracy.DTYPES), accuracy.CASES
    return "\n\n".join([
        *table(f"{title} N", results.find(part="speed"), LENGTHS, [*GMA, *CHUNKED, *SDPA, *FLA]),
        *table(f"dim 128: {title} N", results.find(part="dims", dim=128), DIM_LENGTHS, ours),
        *table(f"N = 4096: {title} components", dims, MORE_COMPONENTS, GMA_EXTREMES, "components"),
        *table(f"65,536 tokens or one sequence: {per_1000}", spread, lengths.values(), ours, "column", per_token),
        *table(f"one sequence: {per_1000}", one, lengths.values(), ours, "column", per_token),
        *table(f"one sequence of 8 heads: wall time of a call, {title} N", host, HOST_LENGTHS, ours),
        *table("peak memory beyond the necessary, as a share of it", results.find(part="memory"), [4096], RIVALS, show=share),
        *table("largest error / error of chunked in the same dtype", results.find(part="accuracy"), dtypes, cases, "dtype", ratio, "case"),
    ])  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Every measurement goes to the JSON file at once."""
    setting = {"dtype": "bfloat16", "tokens": TOKENS, **Shape(0, 0)._asdict(), "batch": "tokens / length, at least 1"}
    setting |= {"length": list(LENGTHS), "seconds": options.seconds, "accuracy": accuracy.SHAPE._asdict()}
    results = Results(options.output, "kernels.attention_gpu", setting, one_device=True)
    refused = set()  # a kernel that is refused at one length is not tried at others
    for part in options.parts:
        for key, function in calls(part, options.seconds):
            if key.get("rival") not in refused:
                row = results.measure(key, function)
                refused |= {key["rival"]} if key.get("rival") in FLA and "forward_ms" not in row else set()


def add_options(add) -> None:
    add("--parts", nargs="+", choices=PARTS, default=[name for name in PARTS if name != "fla"])
    add("--seconds", type=float, default=0.15, help="per measurement, after half as long a warm-up")


def report(content: dict) -> str:
    return f"{tables(content)}\n\n{summary(content)}\n\n{comparison(content)}"


def main() -> None:
    command(__doc__, "gpu_attention_*", add_options, run, report, needs_gpu=True)


if __name__ == "__main__":
    main()
