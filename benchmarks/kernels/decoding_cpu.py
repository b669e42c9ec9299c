# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Milliseconds a token on a CPU, and calls into PyTorch per layer and token, of small models beside a Llama of the same size: what the
host costs.

    python benchmarks/kernels/decoding_cpu.py --output benchmarks/results/decoding_cpu.json

One thread, batch 1, 4 layers of width 64, 4 heads, 16 components, a prompt of 40 tokens. The models take turns, 25 tokens each; the
fastest and the median turn are reported, because other programs slow a turn down and none makes it faster.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from gma_hf import GMAConfig, GMAForCausalLM, convert_to_gma
from gma_hf.cache_argument import CACHE_NAME


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
NUM_COMPONENTS, WINDOW, PROMPT, TOKENS = 16, 16, 40, 25


class CountCalls(TorchDispatchMode):
    """Counts the calls into PyTorch that are made within it."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)).eval()


def native(preset: str, **options):
    torch.manual_seed(0)
    return GMAForCausalLM(GMAConfig.from_preset(preset, **SIZES, num_components=NUM_COMPONENTS, **options)).eval()


MODELS = {
    "Llama": llama,
    "paper block": lambda: native("paper"),
    "gated block": lambda: native("gated"),
    "gated block + window": lambda: native("gated", window_size=WINDOW),
    "converted Llama": lambda: convert_to_gma(llama(), num_components=NUM_COMPONENTS).eval(),
    "converted Llama + window": lambda: convert_to_gma(
        llama(), num_components=NUM_COMPONENTS, window_size=WINDOW
    ).eval(),
}


def prompted(model) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    tokens = torch.arange(3, 3 + PROMPT)[None]
    model(tokens, **{CACHE_NAME: cache})
    return cache


@torch.no_grad()
def measure(turns: int) -> dict[str, dict[str, float]]:
    models = {name: make() for name, make in MODELS.items()}
    token, times, calls = torch.tensor([[5]]), {name: [] for name in models}, {}
    for name, model in models.items():
        cache = prompted(model)
        for _ in range(2):
            model(token, **{CACHE_NAME: cache})
        with CountCalls() as counted:
            model(token, **{CACHE_NAME: cache})
        calls[name] = counted.number / SIZES["num_hidden_layers"]
    for _ in range(turns):
        for name, model in models.items():
            cache = prompted(model)
            start = time.perf_counter()
            for _ in range(TOKENS):
                model(token, **{CACHE_NAME: cache})
            times[name].append((time.perf_counter() - start) / TOKENS * 1e3)
    return {
        name: {
            "fastest_ms": round(min(times[name]), 3),
            "median_ms": round(statistics.median(times[name]), 3),
            "times_llama": round(min(times[name]) / min(times["Llama"]), 2),
            "calls_per_layer": calls[name],
        }
        for name in models
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(arguments.turns)
    for name, row in figures.items():
        print(f"{name:26}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.output is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        arguments.output.write_text(
            json.dumps({"versions": versions, "models": figures}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
