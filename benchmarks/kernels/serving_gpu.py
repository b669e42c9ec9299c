# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What an engine with continuous batching asks of one attention layer, GMA beside softmax with a cache of the same length.

    python benchmarks/kernels/serving_gpu.py

16 heads of 64 dimensions, 64 components, bfloat16, write weights and forgetting, un-normalised read (the gated block). Many
streams are alive at once, each with a context of some length behind it:

- `decode`: one token a stream. GMA `in slots` advances states where they lie, as the plugin for vLLM does; GMA `copied` copies
  them out of their slots and back. Softmax reads a contiguous cache of keys and values; a paged one is not faster.
- `prefill`: a chunk of new tokens a stream, all streams packed into one row. GMA starts from the state of each stream and leaves
  the next one: `in slots` with lengths that are known on the host, as the plugin does; `packed` by sequence ids, for which the
  host waits for the device. `ragged`: the same number of tokens, in streams of different lengths; softmax has PyTorch's
  `varlen_attn` for that.

Otherwise softmax is PyTorch's `scaled_dot_product_attention` without a mask, which may take its fastest kernel then; within the
chunk it computes a little more than causal attention would. `shared keys` has 4 heads of keys and values for 16 of queries. GMA
costs the same at every length, and so has one row. Everything that can be is replayed as CUDA graphs, as engines do; `eager` is
the same call from Python, and `packed` has that alone. Before anything is timed, GMA is compared with its definition in float64.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.decoding_gpu import capture
from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import pivot
from benchmarks.lib.timing import free_memory, median_time, or_refused, wall_time
from gma_hf.ops import gaussian_mixture_attention, gaussian_mixture_attention_in_slots
from gma_hf.ops.attention.call import AttentionCall
from gma_hf.ops.attention.packed import PackedSequences
from gma_hf.ops.attention.slots import attend_in_slots


SOFTMAX = {"softmax": 1, "softmax, shared keys": 4}  # heads of queries a head of keys
RAGGED_SOFTMAX = "softmax, ragged"
GMA = {
    "decode": ("GMA in slots", "GMA copied"),
    "prefill": ("GMA in slots", "GMA in slots, ragged", "GMA packed", "GMA packed, ragged"),
}
# The plain evaluation in bfloat16 is off by about 4e-3: its inputs and outputs are rounded by as much
LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


class Layer:
    """
    A layer with random numbers.

    Args:
        heads, dim, components (`int`): its shape.
        device (`str`): where it is; on a GPU it is in bfloat16.
    """

    def __init__(self, heads: int, dim: int, components: int, device: str):
        self.heads, self.dim, self.device = heads, dim, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.mixture = {
            "means": torch.randn(heads, components, dim, device=device),
            "raw_variances": torch.randn(heads, components, dim, device=device),
            "prior_logits": torch.randn(heads, components, device=device),
        }

    def tokens(self, rows: int, length: int) -> dict[str, Tensor]:
        """Queries, keys, values, write weights and decays."""
        shape, weights = (rows, length, self.heads, self.dim), (rows, self.heads, length)
        return {
            **{name: self.normal(*shape).transpose(1, 2) for name in ("query", "key", "value")},
            "write_weight": torch.rand(weights, device=self.device),
            "log_decay": -0.1 * torch.rand(weights, device=self.device),
        }

    def normal(self, *shape: int) -> Tensor:
        """Random numbers, made in the layer's dtype: a cache in float32 would not fit."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()

    def states(self, streams: int) -> tuple[Tensor, Tensor]:
        """S and z of so many streams."""
        components = self.mixture["means"].shape[1]
        S = torch.randn(streams, self.heads, components, self.dim, device=self.device)
        return S, 10 * torch.rand(streams, self.heads, components, device=self.device)


def ragged_lengths(streams: int, chunk: int) -> list[int]:
    """As many lengths between 1 and 2 * chunk - 1, of `streams * chunk` tokens together, in any order."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * chunk, ((streams + 1) // 2,), generator=generator).tolist()
    return [chunk] * (streams % 2) + lengths[: streams // 2] + [2 * chunk - n for n in lengths[: streams // 2]]


def packed_ids(lengths: list[int], device: str) -> Tensor:
    """[1, tokens]: the number of the stream of each token."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(device)


def prefill(layer: Layer, tokens: dict, ids: Tensor, states: tuple) -> tuple[Tensor, tuple]:
    """A packed prefill: outputs and the states after it."""
    states = tuple(part[None] for part in states)
    return gaussian_mixture_attention(
        **tokens, **layer.mixture, normalize=False, sequence_ids=ids, initial_state=states, output_final_state=True
    )


def prefill_in_slots(layer: Layer, tokens: dict, sequences: PackedSequences, slots: Tensor, states: tuple) -> Tensor:
    """A packed prefill that advances the states where they lie, with the lengths that all layers of a step share."""
    call = AttentionCall(**tokens, **layer.mixture, normalize=False, output_final_state=True)
    return attend_in_slots(call, sequences, states, slots)


def decode_copied(layer: Layer, tokens: dict, slots: Tensor, states: tuple) -> Tensor:
    """A step that copies the states out of their slots and back."""
    before = tuple(part[slots] for part in states)
    output, after = gaussian_mixture_attention(
        **tokens, **layer.mixture, normalize=False, initial_state=before, output_final_state=True
    )
    for part, new in zip(states, after, strict=True):
        part[slots] = new
    return output


def decode_in_slots(layer: Layer, tokens: dict, slots: Tensor, states: tuple) -> Tensor:
    """A step that advances the states where they lie."""
    return gaussian_mixture_attention_in_slots(**tokens, **layer.mixture, normalize=False, states=states, slots=slots)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def definition(layer: Layer, tokens: dict, states: tuple) -> tuple[Tensor, tuple]:
    """Output and states of rows, in float64."""
    exact = {name: x.double() for name, x in {**tokens, **layer.mixture}.items()}
    states = tuple(part.double() for part in states)
    return gaussian_mixture_attention(
        **exact, normalize=False, initial_state=states, output_final_state=True, backend="reference"
    )


def compare_with_the_definition(layer: Layer) -> dict:
    """The largest relative error of outputs and states: a ragged prefill of 6 streams, and steps, each of both kinds."""
    lengths = [70, 1, 33, 64, 5, 90]
    tokens, states = layer.tokens(1, sum(lengths)), layer.states(len(lengths))
    pool, slots = tuple(part.clone() for part in states), torch.tensor([3, 0, 5, 1, 4, 2], device=layer.device)
    for part, before in zip(pool, states, strict=True):
        part[slots] = before
    sequences = PackedSequences([lengths], slots.device)
    in_slots = prefill_in_slots(layer, tokens, sequences, slots, pool), tuple(part[slots][None] for part in pool)
    results = {
        "prefill in slots": in_slots,
        "prefill packed": prefill(layer, tokens, packed_ids(lengths, layer.device), states),
    }
    errors, first = {}, 0
    for i, length in enumerate(lengths):
        part = {name: x[:, :, first : first + length] for name, x in tokens.items()}
        expected, last = definition(layer, part, tuple(x[i : i + 1] for x in states))
        for name, (output, after) in results.items():
            found = [relative_error(output[:, :, first : first + length], expected)]
            found += [relative_error(x[:, i], y) for x, y in zip(after, last, strict=True)]
            errors[name] = max(errors.get(name, 0.0), *found)
        first += length
    slots = torch.tensor([4, 0, 5], device=layer.device)
    tokens = layer.tokens(len(slots), 1)
    for name, step in (("in slots", decode_in_slots), ("copied", decode_copied)):
        pool = layer.states(6)
        expected, last = definition(layer, tokens, tuple(part[slots] for part in pool))
        found = [relative_error(step(layer, tokens, slots, pool), expected)]
        found += [relative_error(x[slots], y) for x, y in zip(pool, last, strict=True)]
        errors[f"decode {name}"] = max(found)
    wrong = {name: error for name, error in errors.items() if not error <= LARGEST_ERROR[layer.dtype]}
    if wrong:
        sys.exit(f"error: GMA is not what its definition says, so nothing is timed: relative errors {wrong}.")
    return {"relative_errors": errors}


def milliseconds(function: Callable[[], object], seconds: float, device: str) -> float:
    """Median milliseconds of a call."""
    if device == "cuda":
        return median_time(function, seconds)
    times = []
    while len(times) < 3 or sum(times) < 1e3 * seconds:
        times.append(1e3 * wall_time(function))
    return statistics.median(times)


def time_call(function: Callable[[], object], seconds: float, device: str, graph: bool) -> dict:
    """Times of a call; with `graph` replayed as a CUDA graph, and from Python besides."""
    row = {"ms": milliseconds(function, seconds, device)}
    if graph and device == "cuda":
        row = {"ms": milliseconds(capture(function), seconds, device), "ms_eager": row["ms"]}
    return row


@torch.no_grad()
def measure_gma(layer: Layer, work: str, name: str, streams: int, chunk: int, seconds: float) -> dict:
    """A row of GMA."""
    states = layer.states(streams)
    row = {"mib": sum(part.nbytes for part in states) / 2**20}
    if work == "decode":
        tokens, slots = layer.tokens(streams, 1), torch.randperm(streams, device=layer.device)
        step = decode_in_slots if name == "GMA in slots" else decode_copied
        return row | time_call(lambda: step(layer, tokens, slots, states), seconds, layer.device, graph=True)
    lengths = ragged_lengths(streams, chunk) if "ragged" in name else [chunk] * streams
    tokens = layer.tokens(1, streams * chunk)
    if "slots" in name:
        # A replayed step advances the states again and again, which forgetting keeps finite
        sequences, slots = (
            PackedSequences([lengths], torch.device(layer.device)),
            torch.randperm(streams, device=layer.device),
        )
        step = partial(prefill_in_slots, layer, tokens, sequences, slots, states)
        return row | time_call(step, seconds, layer.device, graph=True)
    ids = packed_ids(lengths, layer.device)
    return row | time_call(lambda: prefill(layer, tokens, ids, states), seconds, layer.device, graph=False)


@torch.no_grad()
def measure_softmax(layer: Layer, work: str, name: str, streams: int, chunk: int, length: int, seconds: float) -> dict:
    """A row of softmax: new tokens that read a cache in which they stand already."""
    new, shared = (1 if work == "decode" else chunk), SOFTMAX.get(name, 1)
    shape = (streams, layer.heads // shared, length, layer.dim)
    row = {"mib": 2 * torch.Size(shape).numel() * layer.dtype.itemsize / 2**20}
    if layer.device == "cuda":
        free_memory()
        free = torch.cuda.mem_get_info()[0] / 2**20
        if row["mib"] > 0.9 * free:
            return row | {"refused": f"keys and values need {row['mib']:,.0f} MiB, {free:,.0f} MiB are free"}

    if name == RAGGED_SOFTMAX:
        return row | or_refused(partial(time_ragged_softmax, layer, streams, chunk, length, seconds), Exception)

    def timed() -> dict:
        key, value, query = (layer.normal(*x) for x in (shape, shape, (streams, layer.heads, new, layer.dim)))
        attend = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=shared > 1)
        return time_call(attend, seconds, layer.device, graph=True)

    return row | or_refused(timed)


def time_ragged_softmax(layer: Layer, streams: int, chunk: int, length: int, seconds: float) -> dict:
    """Streams of different numbers of new tokens, each behind as many cached tokens as give `length`, in one kernel."""
    lengths = ragged_lengths(streams, chunk)
    key, value = (layer.normal(streams * length, layer.heads, layer.dim) for _ in range(2))
    query = layer.normal(streams * chunk, layer.heads, layer.dim)
    if layer.device != "cuda":

        def attend() -> None:
            for i, part in enumerate(query.split(lengths)):
                rows = (
                    x.transpose(0, 1)[None] for x in (part, *(y[i * length : (i + 1) * length] for y in (key, value)))
                )
                F.scaled_dot_product_attention(*rows)

        return time_call(attend, seconds, layer.device, graph=False)
    from torch.nn.attention.varlen import varlen_attn

    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(layer.device, torch.int32)
    cached = torch.arange(0, (streams + 1) * length, length, dtype=torch.int32, device=layer.device)
    attend = partial(varlen_attn, query, key, value, ends, cached, max(lengths), length)
    return time_call(attend, seconds, layer.device, graph=True)


def run(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch.cuda.is_available() is False; --device cpu runs small sizes on the processor")
    if options.heads % 4 != 0:
        sys.exit(
            f"error: --heads is {options.heads}, expected a multiple of 4: softmax with shared keys has a fourth of them"
        )
    torch.manual_seed(0)
    shape = {"heads": options.heads, "dim": options.dim, "components": options.components}
    layer = Layer(**shape, device=options.device)
    setting = {**shape, "dtype": str(layer.dtype), "chunk": options.chunk,
               "seconds": options.seconds}  # fmt: skip
    results = Results(options.output, "kernels.serving_gpu", setting, one_device=True)
    with torch.no_grad():
        results.measure("comparison with the definition", compare_with_the_definition, layer)
    for work, streams in itertools.product(GMA, options.streams):
        for name in GMA[work]:
            key = {"work": work, "layer": name, "streams": streams}
            results.measure(key, measure_gma, layer, work, name, streams, options.chunk, options.seconds)
        rivals = SOFTMAX if work == "decode" else (*SOFTMAX, RAGGED_SOFTMAX)
        for name, length in itertools.product(rivals, options.lengths):
            key = {"work": work, "layer": name, "streams": streams, "length": length}
            results.measure(key, measure_softmax, layer, work, name, streams, options.chunk, length, options.seconds)


def tables(content: dict) -> str:
    """A table for each kind of work: milliseconds of one layer by the number of streams."""
    results, found = Results.of(content), []
    rows = [row for row in results.rows.values() if "work" in row]
    for work in GMA:
        mine = [row for row in rows if row["work"] == work]
        kinds = {(row["layer"], row.get("length")): None for row in mine}
        names = {kind: kind[0] if kind[1] is None else f"{kind[0]}, {kind[1]:,} tokens" for kind in kinds}
        cells = {
            ((row["layer"], row.get("length")), row["streams"]):
            f"{row['ms']:.3f} ({row['mib']:,.0f})" if "ms" in row else "refused"
            for row in mine
        }  # fmt: skip
        title = f"{work}: ms of one layer (MiB of states or keys and values) by streams"
        found += pivot(title, sorted({row["streams"] for row in mine}), names, cells)
    errors = results.rows.get("comparison with the definition", {}).get("relative_errors", {})
    found.append("relative errors: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return "\n\n".join(found)


def add_options(add: Callable) -> None:
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--streams", type=int, nargs="+", default=[32, 64, 128, 256])
    add("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    add("--chunk", type=int, default=128, help="new tokens of a stream in one prefill")
    add("--heads", type=int, default=16)
    add("--dim", type=int, default=64)
    add("--components", type=int, default=64)
    add("--seconds", type=float, default=0.2, help="per measurement; from Python, and as a graph")


def main() -> None:
    command(__doc__, "gpu_serving_*", add_options, run, tables)


if __name__ == "__main__":
    main()
