# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Time per token of decoding on a GPU, GMA beside a softmax model of the same size with a cache of keys and values.

    python benchmarks/kernels/decoding_gpu.py

12 layers of width 768 with 12 heads, 64 components, 32,000 tokens of vocabulary, bfloat16, greedy. A round decodes the
STEPS tokens in front of a position; every token is fed back as the input of the next step. Each model decodes

- `compiled`: static cache, `torch.compile` of the model, the whole step replayed as one CUDA graph;
- `eager`: dynamic cache, as `generate` runs without further arguments; launching the kernels takes most of the time.

No cache is filled by decoding up to the position. What a step reads, writes and computes depends on the shape of the cache
and on the position, not on the numbers in it. So the keys and values of the softmax layers are random, and a GMA layer,
whose state has one size, gets the state of a short random prompt and is told the position. The static cache of softmax is
full, so that its attention needs no mask and PyTorch may take its FlashAttention kernel; the one that `generate` makes is
longer than the sequence and masked, which rules that kernel out.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from benchmarks.kernels.models import MODELS, NO_MASK, SOFTMAX, make_model
from benchmarks.kernels.models import SIZES as MODEL_SIZES
from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import markdown, pivot
from benchmarks.lib.timing import free_memory, or_refused, wall_time
from gma_hf import GMAConfig, GMAForCausalLM
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMACacheLayer


SIZES = {**MODEL_SIZES, "vocab_size": 32000, "max_position_embeddings": 131072}
MODES = ("compiled", "eager")
POSITIONS = (1024, 8192, 32768, 131072)
SUMMARY = {
    SOFTMAX: f"{SOFTMAX}, KV cache",
    "GMA paper": "GMA, paper block",
    "GMA gated": "GMA, gated block",
    "GMA correlated": "GMA, correlated block",
}
STEPS = 32
PROMPT = 64
LEAST_ROUNDS = 3


def fill_cache(model, mode: str, batch: int, position: int, prompt: int) -> Cache:
    """
    A cache like that of a sequence which has reached `position`, with room for no further token: the state of a random prompt in
    GMA layers, random keys and values in those of softmax.
    """
    kinds = {"eager": DynamicCache, "compiled": lambda config: StaticCache(config=config, max_cache_len=position)}
    cache = kinds[mode](config=model.config)
    model(torch.randint(model.config.vocab_size, (batch, prompt), device=model.device), **{CACHE_NAME: cache})
    for layer in cache.layers:
        if isinstance(layer, GMACacheLayer):
            continue
        if mode == "eager":  # a cache that grows gets the room first
            shape = (*layer.keys.shape[:2], position, layer.keys.shape[-1])
            layer.keys, layer.values = (layer.keys.new_empty(shape) for _ in range(2))
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def set_position(cache: Cache, position: int) -> None:
    """Take the cache to `position`: tokens behind it are dropped, or overwritten by those to come."""
    for layer in cache.layers:
        if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length.fill_(position)
        elif isinstance(layer, GMACacheLayer):
            layer.cumulative_length = position
        else:
            layer.keys, layer.values = layer.keys[:, :, :position], layer.values[:, :, :position]


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph: what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and tunes, which cannot be captured
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def make_step(model: GMAForCausalLM, mode: str, cache: Cache, batch: int) -> Callable[[], None]:
    """A function that decodes one token per row and feeds it back."""
    token = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
    if mode == "compiled":
        torch._dynamo.reset()  # every cache has a shape of its own: do not compile for shapes in general
        forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    else:
        forward = model.forward

    def step() -> None:
        logits = forward(input_ids=token, **{CACHE_NAME: cache}, attention_mask=NO_MASK).logits
        token.copy_(logits[:, -1:].argmax(dim=-1))

    return step


def time_step(step: Callable[[], None], reset: Callable[[], None], seconds: float) -> float:
    """Median milliseconds of a step, over rounds of STEPS steps from the same position."""
    rounds, start = [], time.perf_counter()
    while len(rounds) <= LEAST_ROUNDS or time.perf_counter() - start < seconds:
        reset()
        rounds.append(1e3 * wall_time(lambda: [step() for _ in range(STEPS)]) / STEPS)
    return statistics.median(rounds[1:])  # the first one warms up


def cache_gib(config: GMAConfig, mode: str, batch: int, position: int) -> float:
    """GiB that keys and values need; a dynamic cache holds those of one layer twice while it grows."""
    layers = config.layer_types.count("full_attention")
    layers += layers > 0 and mode == "eager"
    return 2 * 2 * layers * batch * config.num_key_value_heads * config.head_dim * position / 2**30


class Decoding:
    """A model in one mode and batch. A GMA model goes on with the cache and the graph of the first position."""

    def __init__(self, model: GMAForCausalLM, mode: str, batch: int, seconds: float):
        self.model, self.mode, self.batch, self.seconds = model, mode, batch, seconds
        self.is_softmax = "full_attention" in model.config.layer_types
        self.cache = self.run = None

    @torch.no_grad()
    def measure(self, position: int) -> dict:
        if self.is_softmax:
            self.cache = self.run = None
            free_memory()
        needed = cache_gib(self.model.config, self.mode, self.batch, position)
        free = torch.cuda.mem_get_info()[0] / 2**30
        if needed > 0.95 * free:
            return {"refused": f"keys and values need {needed:.0f} GiB, {free:.0f} GiB are free"}
        if self.run is None:
            self.cache = fill_cache(self.model, self.mode, self.batch, position, PROMPT)
            set_position(self.cache, position - STEPS)
            step = make_step(self.model, self.mode, self.cache, self.batch)
            self.run = capture(step) if self.mode == "compiled" else step
        milliseconds = time_step(self.run, lambda: set_position(self.cache, position - STEPS), self.seconds)
        return {"ms_per_token": milliseconds, "tokens_per_second": 1e3 * self.batch / milliseconds}


def tables(content: dict) -> str:
    """A table per batch."""
    rows, found = list(Results.of(content).rows.values()), []
    batches, positions = (sorted({row[name] for row in rows}) for name in ("batch", "position"))
    names = {(name, mode): f"{name}, {mode}" for mode in MODES for name in MODELS}

    def shown(row: dict) -> str:
        return "no memory" if "refused" in row else f"{row['ms_per_token']:.3f} ({row['tokens_per_second']:,.0f})"

    for batch in batches:
        cells = {((row["model"], row["mode"]), row["position"]): shown(row) for row in rows if row["batch"] == batch}
        found += pivot(f"batch {batch}: ms per token (tokens per second) at position", positions, names, cells)
    return "\n\n".join(found)


def summary(content: dict) -> str:
    """Milliseconds per token of one compiled sequence, as the README shows them."""
    rows = [row for row in Results.of(content).rows.values() if (row["batch"], row["mode"]) == (1, "compiled")]
    times = {(row["model"], row["position"]): row["ms_per_token"] for row in rows if "refused" not in row}
    positions = sorted({position for _, position in times})
    lines = [
        [SUMMARY[name], *(f"{times[name, position]:.2f}" for position in positions)]
        for name in SUMMARY
        if (name, positions[0]) in times
    ]
    return markdown(["", *(f"{position:,} tokens" for position in positions)], lines)


def run(options: argparse.Namespace) -> None:
    positions, longest = sorted(options.positions), SIZES["max_position_embeddings"]
    if positions[0] < PROMPT + STEPS or positions[-1] > longest:
        sys.exit(f"error: --positions must lie between {PROMPT + STEPS} and {longest}, got {positions}")
    setting = {**SIZES, "dtype": "bfloat16", "steps": STEPS, "seconds": options.seconds}
    results = Results(options.output, "kernels.decoding_gpu", setting, one_device=True)
    for name in options.models:
        free_memory()
        model = make_model(name, SIZES).to(torch.bfloat16).eval()
        for mode, batch in itertools.product(options.modes, options.batches):
            decoding = Decoding(model, mode, batch, options.seconds)
            for position in positions:
                key = {"model": name, "mode": mode, "batch": batch, "position": position}
                results.measure(key, or_refused, partial(decoding.measure, position))
        del model, decoding


def add_options(add) -> None:
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--batches", type=int, nargs="+", default=[1, 64])
    add("--positions", type=int, nargs="+", default=POSITIONS)
    add("--seconds", type=float, default=1.0, help="per measurement")


def main() -> None:
    command(__doc__, "gpu_decode_*", add_options, run, tables, needs_gpu=True)


if __name__ == "__main__":
    main()
