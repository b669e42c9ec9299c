# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of converted models on a GPU, beside the original.

    python benchmarks/conversion/speed.py
    python benchmarks/conversion/speed.py --shapes 1b

Llama-shaped models in bfloat16 with random weights (speed does not depend on the numbers): `135m` is SmolLM2-135M, `1b` is of
Llama 3.2 1B's kind; or `--model FOLDER`. The original calls `scaled_dot_product_attention` as users do (cuDNN on Hopper), and a
second time forced to FlashAttention-2; beside it the model converted (64 components), converted with a softmax window of 128
tokens, and with a window and one sink token.

- Prefill: one forward pass without a cache, logits of the last token alone; one sequence, and as many as make 65,536 tokens.
  Peak memory is that of everything, the model included. `compiled`: every decoder layer by `torch.compile`, which leaves
  masks outside of the graphs. (Converted layers cannot look into the positions then, and compute as if sequences were packed.)
- Decoding one sequence: milliseconds per token over STEPS tokens in front of a position, `eager` with a growing cache,
  `compiled` with a static one and the step as a CUDA graph; as in decoding_gpu.py, caches are not filled by decoding but
  put to the position. The memory of the cache is that of its tensors.
"""

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import Cache

from benchmarks.kernels.decoding_gpu import STEPS, capture, fill_cache, set_position, time_step
from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import pivot
from benchmarks.lib.timing import median_time, or_refused, peak_bytes, softmax_by
from gma_hf import convert_to_gma
from gma_hf.cache_argument import CACHE_NAME
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
MODELS = {
    "original, SDPA": None,
    "original, FlashAttention-2": None,
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
        return {"prefill_ms": median_time(run, seconds), "peak_gib": peak_bytes(run)[1] / 2**30}
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def cache_bytes(cache: Cache) -> int:
    """What the tensors of a cache take."""
    found = {}
    for layer in cache.layers:
        for x in layer.history if isinstance(layer, GMACacheLayer) else (layer.keys, layer.values):
            if isinstance(x, torch.Tensor):
                found[x.data_ptr()] = x.nbytes
    return sum(found.values())


def measure_decode(model, mode: str, position: int, seconds: float) -> dict:
    """Milliseconds per token in front of a position, and what the cache takes there."""
    cache = fill_cache(model, mode, 1, position, PROMPT)
    set_position(cache, position - STEPS)
    token = torch.randint(model.config.vocab_size, (1, 1), device=model.device)
    place = torch.full((1, 1), position - STEPS, device=model.device)
    forward = model.forward
    if mode == "compiled":
        torch._dynamo.reset()
        forward = torch.compile(model.forward, dynamic=False)

    def step() -> None:
        logits = forward(input_ids=token, position_ids=place, **{CACHE_NAME: cache}).logits
        token.copy_(logits[:, -1:].argmax(dim=-1))
        place.add_(1)

    def reset() -> None:
        set_position(cache, position - STEPS)
        place.fill_(position - STEPS)

    size = cache_bytes(cache)
    run = capture(step) if mode == "compiled" else step
    return {"ms_per_token": time_step(run, reset, seconds), "cache_mib": size / 2**20}


PARTS = {"prefill": measure_prefill, "decode": measure_decode}


@torch.no_grad()
def measure(model, name: str, part: str, seconds: float, options: dict) -> dict:
    """A row of one model; what does not fit into memory stands in it with the reason, and so does what a rival refuses."""
    errors = torch.cuda.OutOfMemoryError if name.startswith("GMA") else RuntimeError
    with softmax_by(name):
        return or_refused(partial(PARTS[part], model, seconds=seconds, **options), errors)


def tables(content: dict) -> str:
    """A table per shape and quantity, with a line per model and mode."""
    results, found = Results.of(content), []
    names = {(name, mode): f"{name}, {mode}" for name in MODELS for mode in MODES}

    def shown(row: dict, field: str) -> str:
        if field in row:
            return f"{row[field]:.4g}"
        return "no memory" if "OutOfMemory" in row.get("refused", "") else "refused"

    for shape in dict.fromkeys(row["shape"] for row in results.find()):
        prefill, decode = (results.find(part=part, shape=shape) for part in PARTS)
        one = [row for row in prefill if row["batch"] == 1]
        many = [row for row in prefill if row["batch"] * row["length"] == TOKENS]
        for what, field, column, rows in (
            ("prefill of one sequence: ms by length", "prefill_ms", "length", one),
            ("prefill of one sequence: peak memory in GiB by length", "peak_gib", "length", one),
            (f"prefill of {TOKENS:,} tokens: ms by length", "prefill_ms", "length", many),
            (f"prefill of {TOKENS:,} tokens: peak memory in GiB by length", "peak_gib", "length", many),
            ("decoding: ms per token by position", "ms_per_token", "position", decode),
            ("decoding: cache in MiB by position", "cache_mib", "position", decode),
        ):
            cells = {((row["model"], row["mode"]), row[column]): shown(row, field) for row in rows}
            found += pivot(f"{shape}, {what}", sorted({row[column] for row in rows}), names, cells)
    return "\n\n".join(found)


def run(options: argparse.Namespace) -> None:
    """Every measurement goes to the JSON file at once."""
    if any(position < PROMPT + STEPS for position in options.positions):
        sys.exit(f"error: --positions must be at least {PROMPT + STEPS}, got {sorted(options.positions)}")
    setting = {"dtype": "bfloat16", "tokens": TOKENS, "steps": STEPS, "components": 64, "shapes": SHAPES}
    results = Results(options.output, "conversion.speed", setting, one_device=True)
    for shape, name in itertools.product([options.model] if options.model else options.shapes, options.models):
        model = make_model(shape, name, options.model, "cuda")
        for mode in options.modes:
            calls = [
                ("prefill", {"mode": mode, "batch": batch, "length": length})
                for length in options.lengths for batch in sorted({1, max(1, TOKENS // length)})
            ]  # fmt: skip
            calls += [("decode", {"mode": mode, "position": position}) for position in options.positions]
            for part, call in calls:
                key = {"part": part, **call, "shape": shape, "model": name}
                results.measure(key, measure, model, name, part, options.seconds, call)


def add_options(add) -> None:
    add("--shapes", nargs="+", choices=list(SHAPES), default=["135m"])
    add("--model", help="folder of a pretrained model, instead of random weights in --shapes")
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--lengths", type=int, nargs="*", default=LENGTHS, help="of prefill")
    add("--positions", type=int, nargs="*", default=POSITIONS, help="of decoding")
    add("--seconds", type=float, default=0.3, help="per measurement, after half as long a warm-up")


def main() -> None:
    command(__doc__, "conversion_speed_*", add_options, run, tables, needs_gpu=True)


if __name__ == "__main__":
    main()
