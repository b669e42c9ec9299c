# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of converted models on a GPU, beside the original with PyTorch's FlashAttention.

    python benchmarks/conversion/speed.py
    python benchmarks/conversion/speed.py --shapes 1b

Llama-shaped models in bfloat16 with random weights (speed does not depend on the numbers): `135m` is SmolLM2-135M, `1b` is of
Llama 3.2 1B's kind; or `--model FOLDER`. Four of each: the original, converted (64 components), converted with a
softmax window of 128 tokens, and with a window and one sink token.

- Prefill: one forward pass without a cache, logits of the last token alone; one sequence, and as many as make 65,536 tokens.
  Peak memory is that of everything, the model included. `compiled`: every decoder layer by `torch.compile`, which leaves
  masks outside of the graphs, so that the original keeps FlashAttention. (Converted layers cannot look into the positions
  then, and compute as if sequences were packed.)
- Decoding one sequence: milliseconds per token over STEPS tokens in front of a position, `eager` with a growing cache,
  `compiled` with a static one and the step as a CUDA graph; as in decoding_gpu.py, caches are not filled by decoding but
  put to the position. The memory of the cache is that of its tensors.

What the output file holds already is not measured again without `--again`.
"""

import argparse
import itertools
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache

from benchmarks.kernels.decoding_gpu import STEPS, capture, fill_softmax_layers, set_position, time_step
from benchmarks.lib.report import (
    Report,
    add_report_arguments,
    default_output,
    first_line,
    free_memory,
    median_time,
    print_table,
)
from gma_hf import convert_to_gma
from gma_hf.modeling import GMACacheLayer


COMMON = {"tie_word_embeddings": True, "max_position_embeddings": 131072, "attn_implementation": "sdpa"}
SHAPES = {
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
}  # fmt: skip
# Options of `convert_to_gma`; None leaves the model as it is
ORIGINAL = "original, SDPA"
MODELS = {
    ORIGINAL: None,
    "GMA + window 128": {"window_size": 128},
    "GMA + window 128 + sink": {"window_size": 128, "num_sink_tokens": 1},
    "GMA": {},
}
MODES = ("eager", "compiled")
TOKENS = 65536
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
POSITIONS = (1024, 8192, 32768, 131072)
PROMPT = 256  # longer than the window


def make_model(shape: str, name: str, folder: str | None, device: str):
    """The model in bfloat16."""
    torch.manual_seed(0)
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.to(device)
    else:
        config = LlamaConfig(**COMMON, **SHAPES[shape])
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if MODELS[name] is not None:
        convert_to_gma(model, **MODELS[name])
    return model.to(torch.bfloat16).eval()


def peak_gib(function) -> float:
    """GiB in use at most while the function runs."""
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure_prefill(model, mode: str, batch: int, length: int, seconds: float) -> dict:
    """Milliseconds of a forward pass."""
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    layers = model.get_decoder().layers
    if mode == "compiled":
        torch._dynamo.reset()
        for layer in layers:
            layer.compile(dynamic=False)

    def run():
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)

    try:
        run()
        return {"prefill_ms": median_time(run, seconds), "peak_gib": peak_gib(run)}
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def cache_bytes(cache: Cache) -> int:
    """What the tensors of a cache take."""
    found = {}
    for layer in cache.layers:
        is_converted = isinstance(layer, GMACacheLayer)
        for tensor in layer.window_history if is_converted else (layer.keys, layer.values):
            if tensor is not None:
                found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def fill_cache(model, mode: str, position: int) -> Cache:
    """A cache like that of a sequence which has reached `position`."""
    config, tokens = model.config, torch.randint(model.config.vocab_size, (1, PROMPT), device=model.device)
    cache = DynamicCache(config=config) if mode == "eager" else StaticCache(config=config, max_cache_len=position)
    model(tokens, past_key_values=cache, logits_to_keep=1)
    fill_softmax_layers(cache, mode, position)
    return cache


def measure_decode(model, mode: str, position: int, seconds: float) -> dict:
    """Milliseconds per token in front of a position, and what the cache takes there."""
    cache = fill_cache(model, mode, position)
    set_position(cache, position - STEPS)
    token = torch.randint(model.config.vocab_size, (1, 1), device=model.device)
    place = torch.full((1, 1), position - STEPS, device=model.device)
    forward = model.forward
    if mode == "compiled":
        torch._dynamo.reset()
        forward = torch.compile(model.forward, dynamic=False)

    def step() -> None:
        logits = forward(input_ids=token, position_ids=place, past_key_values=cache).logits
        token.copy_(logits[:, -1:].argmax(dim=-1))
        place.add_(1)

    def reset() -> None:
        set_position(cache, position - STEPS)
        place.fill_(position - STEPS)

    size = cache_bytes(cache)
    run = capture(step) if mode == "compiled" else step
    return {"ms_per_token": time_step(run, reset, seconds), "cache_mib": size / 2**20}


@torch.no_grad()
def measure(report: Report, key: dict, function, *arguments) -> None:
    """A row, unless the report holds it; what does not fit into memory stands in it with the reason."""
    if not report.wants(**key):
        return
    free_memory()
    try:
        values = function(*arguments)
    except torch.cuda.OutOfMemoryError as error:
        values = {"refused": first_line(error)}
    report.add(key, values)


def measure_all(report: Report, shape: str, name: str, options: argparse.Namespace, device: str = "cuda") -> None:
    """All rows of one model."""
    model = make_model(shape, name, options.model, device)
    for mode in options.modes:
        for length in options.lengths:
            for batch in sorted({1, max(1, TOKENS // length)}):
                key = {
                    "part": "prefill",
                    "shape": shape,
                    "model": name,
                    "mode": mode,
                    "batch": batch,
                    "length": length,
                }
                measure(report, key, measure_prefill, model, mode, batch, length, options.seconds)
        for position in options.positions:
            key = {"part": "decode", "shape": shape, "model": name, "mode": mode, "position": position}
            measure(report, key, measure_decode, model, mode, position, options.seconds)


def print_tables(report: Report) -> None:
    """A table per shape and quantity, with a line per model and mode."""

    def table(title: str, field: str, column: str, rows: list[dict]) -> None:
        columns, lines = sorted({row[column] for row in rows}), {}
        for name, mode in itertools.product(MODELS, MODES):
            found = {row[column]: row for row in rows if (row["model"], row["mode"]) == (name, mode)}
            cells = [found.get(x, {}) for x in columns]
            if found:
                lines[f"{name}, {mode}"] = [
                    "no memory" if "refused" in row else f"{row[field]:.4g}" if field in row else "" for row in cells
                ]
        if lines:
            print_table(title, columns, lines)

    for shape in dict.fromkeys(row["shape"] for row in report.rows()):
        rows = report.rows(part="prefill", shape=shape)
        kinds = {
            "one sequence": [row for row in rows if row["batch"] == 1],
            f"{TOKENS:,} tokens": [row for row in rows if row["batch"] * row["length"] == TOKENS],
        }
        for kind, chosen in kinds.items():
            table(f"{shape}, prefill of {kind}: ms by length", "prefill_ms", "length", chosen)
            table(f"{shape}, prefill of {kind}: peak memory in GiB by length", "peak_gib", "length", chosen)
        rows = report.rows(part="decode", shape=shape)
        table(f"{shape}, decoding: ms per token by position", "ms_per_token", "position", rows)
        table(f"{shape}, decoding: cache in MiB by position", "cache_mib", "position", rows)


def targets(report: Report) -> list[tuple[str, float | None, str, float]]:
    """Prefill faster than the original's from 4k tokens on, and a cache of one size."""
    found = []
    for shape, name in itertools.product(dict.fromkeys(row["shape"] for row in report.rows()), list(MODELS)[1:]):
        for length in (n for n in LENGTHS if n >= 4096):
            key = {"part": "prefill", "shape": shape, "batch": TOKENS // length, "length": length}
            times = [
                min((row["prefill_ms"] for row in report.rows(model=x, **key) if "prefill_ms" in row), default=None)
                for x in (ORIGINAL, name)
            ]
            ratio = None if None in times else times[0] / times[1]
            found.append((f"{shape}, {length:,} tokens: prefill time of the original / {name}", ratio, ">=", 1.0))
        rows = report.rows(part="decode", shape=shape, model=name, mode="eager")
        sizes = [row["cache_mib"] for row in rows if "cache_mib" in row]
        spread = max(sizes) / min(sizes) if len(sizes) > 1 else None
        found.append((f"{shape}: largest / smallest cache of {name}", spread, "<=", 1.0))
    return found


def main() -> None:
    """Measure, print the tables and the targets; every measurement goes to the JSON file at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["135m"])
    parser.add_argument("--model", help="folder of a pretrained model, instead of random weights in --shapes")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="of prefill")
    parser.add_argument("--positions", type=int, nargs="*", default=POSITIONS, help="of decoding")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement, after half as long a warm-up")
    add_report_arguments(parser)
    options = parser.parse_args()
    if any(position < PROMPT + STEPS for position in options.positions):
        parser.error(f"positions must be at least {PROMPT + STEPS}, got {sorted(options.positions)}")
    output = options.output or default_output("conversion_speed")
    setting = {"dtype": "bfloat16", "tokens": TOKENS, "steps": STEPS, "components": 64, "shapes": SHAPES}
    report = Report(output, "conversion.speed", setting, options.again)
    for shape in options.shapes if options.model is None else [options.model]:
        for name in options.models:
            measure_all(report, shape, name, options)
    print_tables(report)
    report.print_targets(targets(report))


if __name__ == "__main__":
    main()
