# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Milliseconds a token on a CPU, and calls into PyTorch per layer and token, of small models beside a Llama of the same size: what the
host costs.

    python benchmarks/kernels/decoding_cpu.py --renew --output benchmarks/results/decoding_cpu.json

One thread, batch 1, 4 layers of width 64, 4 heads, 16 components, a prompt of 40 tokens. The models take turns, 25 tokens each; the
fastest and the median turn are reported, because other programs slow a turn down and none makes it faster. Measure on a machine
that does nothing else.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import markdown
from benchmarks.lib.timing import cpu_model, wall_time
from gma_hf import GMAConfig, GMAForCausalLM, convert_to_gma
from gma_hf.cache_argument import CACHE_NAME


SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4
}  # fmt: skip
NUM_COMPONENTS, WINDOW, PROMPT, TOKENS = 16, 16, 40, 25
# Milliseconds a token and calls per layer before each layer kept what depends on its parameters alone, on a machine of the same
# kind on 2026-11-27: compare them with Llama's in the same column
BEFORE = {
    "Llama": (2.1, 78), "paper block": (3.9, 151), "gated block": (5.9, 185), "gated block + window": (8.6, 267),
    "converted Llama": (5.9, 202), "converted Llama + window": (7.7, 254),
}  # fmt: skip


class CountCalls(TorchDispatchMode):
    """Counts the calls into PyTorch that are made within it."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def native(preset: str, **options):
    return GMAForCausalLM(GMAConfig.from_preset(preset, **SIZES, num_components=NUM_COMPONENTS, **options))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4))


MODELS = {
    "Llama": llama,
    "paper block": lambda: native("paper"),
    "gated block": lambda: native("gated"),
    "gated block + window": lambda: native("gated", window_size=WINDOW),
    "converted Llama": lambda: convert_to_gma(llama(), num_components=NUM_COMPONENTS),
    "converted Llama + window": lambda: convert_to_gma(llama(), num_components=NUM_COMPONENTS, window_size=WINDOW),
}


@torch.no_grad()
def measure(turns: int) -> dict[str, dict[str, float]]:
    """The rows of all models, which take turns."""
    models, times, calls = {}, {name: [] for name in MODELS}, {}
    prompt, token = torch.arange(3, 3 + PROMPT)[None], torch.tensor([[5]])

    def decode(model, cache: DynamicCache, tokens: int) -> None:
        for _ in range(tokens):
            model(token, **{CACHE_NAME: cache})

    def prompted(model) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(prompt, **{CACHE_NAME: cache})
        return cache

    for name, make in MODELS.items():
        torch.manual_seed(0)
        models[name] = model = make().eval()
        decode(model, cache := prompted(model), 2)
        with CountCalls() as counted:
            decode(model, cache, 1)
        calls[name] = counted.number / SIZES["num_hidden_layers"]
    for _ in range(turns):
        for name, model in models.items():
            seconds = wall_time(partial(decode, model, prompted(model), TOKENS))
            times[name].append(1e3 * seconds / TOKENS)
    return {
        name: {
            "fastest_ms": round(min(own), 3),
            "median_ms": round(statistics.median(own), 3),
            "times_llama": round(min(own) / min(times["Llama"]), 2),
            "calls_per_layer": calls[name],
        }
        for name, own in times.items()
    }


def table(content: dict) -> str:
    """Before and after, with Llama of the same run."""
    columns = ["model", "ms a token before", "of Llama's", "ms a token", "median turn", "of Llama's"]
    lines = []
    for name, row in content["rows"].items():
        ms, calls = BEFORE[name]
        before = [name, f"{ms:.1f}", f"{ms / BEFORE['Llama'][0]:.2f}"]
        after = [f"{row['fastest_ms']:.2f}", f"{row['median_ms']:.2f}", f"{row['times_llama']:.2f}"]
        lines.append([*before, *after, str(calls), f"{row['calls_per_layer']:g}"])
    return markdown([*columns, "calls per layer before", "calls per layer"], lines)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    setting = {**SIZES, "num_components": NUM_COMPONENTS, "window_size": WINDOW, "prompt": PROMPT, "tokens": TOKENS}
    setting |= {"turns": options.turns, "device": cpu_model()}
    results = Results(options.output, "kernels.decoding_cpu", setting, one_device=True)
    if not results.rows:  # all in one run, or their times could not be compared
        for name, row in measure(options.turns).items():
            results.measure(name, row.copy)


def main() -> None:
    command(__doc__, "decoding_cpu", lambda add: add("--turns", type=int, default=20), run, table)


if __name__ == "__main__":
    main()
