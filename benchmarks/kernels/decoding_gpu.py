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
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import pivot
from benchmarks.lib.timing import first_line, free_memory, wall_time
from gma_hf import GMAConfig, GMAForCausalLM
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMACacheLayer


SIZES = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_components": 64, "vocab_size": 32000,
    "max_position_embeddings": 131072,
}  # fmt: skip
MODELS = {
    "GMA gated": ("gated", "linear_attention"),
    "GMA correlated": ("correlated", "linear_attention"),
    "GMA paper": ("paper", "linear_attention"),
    "softmax + RoPE": ("gated", "full_attention"),
}
GMA = [name for name, (_, layer_type) in MODELS.items() if layer_type == "linear_attention"]
MODES = ("compiled", "eager")
POSITIONS = (1024, 8192, 32768, 131072)
STEPS = 32
PROMPT = 64
LEAST_ROUNDS = 3
# The masks that `generate` prepares for compiled decoding, one per type of layer: here every token is real
NO_MASK = {"full_attention": None, "linear_attention": None}


def make_model(name: str, sizes: dict = SIZES, device: str = "cuda") -> GMAForCausalLM:
    """The model in bfloat16 with random weights."""
    preset, layer_type = MODELS[name]
    config = GMAConfig.from_preset(preset, **sizes, layer_types=[layer_type] * sizes["num_hidden_layers"])
    torch.manual_seed(0)
    with torch.device(device):
        return GMAForCausalLM(config).to(torch.bfloat16).eval()


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


@torch.no_grad()
def measure(
    results: Results, model: GMAForCausalLM, name: str, mode: str, batch: int, positions, seconds: float
) -> None:
    """All positions of a model, mode and batch."""
    run = None

    def row(position: int) -> dict:
        nonlocal run, cache
        if name not in GMA:
            cache = run = None
            free_memory()
        needed, free = cache_gib(model.config, mode, batch, position), torch.cuda.mem_get_info()[0] / 2**30
        if needed > 0.95 * free:
            return {"refused": f"keys and values need {needed:.0f} GiB, {free:.0f} GiB are free"}
        try:
            if run is None:  # a GMA model goes on with the cache and the graph of the first position
                cache = fill_cache(model, mode, batch, position, PROMPT)
                set_position(cache, position - STEPS)
                step = make_step(model, mode, cache, batch)
                run = capture(step) if mode == "compiled" else step
            milliseconds = time_step(run, lambda: set_position(cache, position - STEPS), seconds)
        except torch.cuda.OutOfMemoryError as error:
            cache = run = None
            return {"refused": first_line(error)}
        return {"ms_per_token": milliseconds, "tokens_per_second": 1e3 * batch / milliseconds}

    cache = None
    for position in positions:
        key = {"model": name, "mode": mode, "batch": batch, "position": position}
        results.measure(key, row, position)


def tables(content: dict) -> str:
    """A table per batch."""
    results, found = Results.of(content), []
    batches, positions = (sorted({row[name] for row in results.rows.values()}) for name in ("batch", "position"))
    names = {(name, mode): f"{name}, {mode}" for mode in MODES for name in MODELS}
    for batch in batches:

        def cell(key: tuple[str, str], position: int, batch: int = batch) -> str:
            rows = results.find(model=key[0], mode=key[1], batch=batch, position=position)
            if not rows or "refused" in rows[0]:
                return "no memory" if rows else ""
            return f"{rows[0]['ms_per_token']:.3f} ({rows[0]['tokens_per_second']:,.0f})"

        found += pivot(f"batch {batch}: ms per token (tokens per second) at position", positions, names, cell)
    return "\n\n".join(found)


def run(options: argparse.Namespace) -> None:
    setting = {**SIZES, "dtype": "bfloat16", "steps": STEPS, "seconds": options.seconds}
    results = Results(options.output, "kernels.decoding_gpu", setting, one_device=True)
    for name in options.models:
        free_memory()
        model = make_model(name)
        for mode in options.modes:
            for batch in options.batches:
                measure(results, model, name, mode, batch, sorted(options.positions), options.seconds)
        del model


def add_options(add) -> None:
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--batches", type=int, nargs="+", default=[1, 64])
    add("--positions", type=int, nargs="+", default=POSITIONS)
    add("--seconds", type=float, default=1.0, help="per measurement")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    positions, longest = sorted(options.positions), SIZES["max_position_embeddings"]
    if positions[0] < PROMPT + STEPS or positions[-1] > longest:
        parser.error(f"positions must lie between {PROMPT + STEPS} and {longest}, got {positions}")


def main() -> None:
    command(__doc__, "gpu_decode_*", add_options, run, tables, check=check, needs_gpu=True)


if __name__ == "__main__":
    main()
