# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Training speed of a language model on a GPU by length of context, GMA beside the same model with softmax attention.

    python benchmarks/kernels/training_gpu.py

12 layers of width 768 with 12 heads, 64 components, SwiGLU, 8,192 tokens of vocabulary; 65,536 tokens per step whatever the
context; float32 weights under bfloat16 autocast, fused AdamW. Softmax attention is PyTorch's `scaled_dot_product_attention` with
RoPE, as users call it (cuDNN on Hopper) and forced to FlashAttention-2. Of every model
the blocks are compiled one by one, so that all share one compilation, and the head with the loss. A step is the forward
pass, the backward pass and the update; the median of several counts. The GMA layers run on the backend that `--backend`
names, never silently on another.
"""

import argparse
import math
import os
import statistics
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels import models
from benchmarks.kernels.models import NO_MASK, SOFTMAX, make_model
from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import pivot
from benchmarks.lib.timing import or_refused, softmax_by, wall_time
from benchmarks.lib.training import compile_blocks
from gma_hf import GMAForCausalLM
from gma_hf.ops import available_backends
from gma_hf.ops.dispatch import ENVIRONMENT_VARIABLE


SIZES = {**models.SIZES, "vocab_size": 8192}
MODELS = [*models.MODELS, f"{SOFTMAX}, FlashAttention-2"]
CONTEXTS = (1024, 4096, 16384, 65536)
TOKENS = 65536  # per step
WARMUP_STEPS, STEPS = 3, 8


def head_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the next token, a function of its own so that it is compiled in one piece with the head."""
    return F.cross_entropy(F.linear(hidden_states, weight).flatten(0, 1).float(), labels.flatten())


class Training:
    """A model in training: `tokens` per step, `micro_tokens` (at least a sequence) per forward pass."""

    def __init__(self, model: GMAForCausalLM, context: int, tokens: int, micro_tokens: int):
        self.model, self.context = model.train(), context
        self.rows = max(1, micro_tokens // context)
        self.micro_steps = tokens // (self.rows * context)
        if self.micro_steps * self.rows * context != tokens:
            raise ValueError(f"{tokens} tokens per step are no whole number of {self.rows} x {context} tokens.")
        compile_blocks(model, dynamic=False)
        self.head_loss = torch.compile(head_loss, dynamic=False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self) -> Tensor:
        """One update; its loss."""
        model, losses = self.model, []
        for _ in range(self.micro_steps):
            tokens = torch.randint(model.config.vocab_size, (self.rows, self.context + 1), device=model.device)
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                hidden_states = model.model(tokens[:, :-1], attention_mask=NO_MASK, use_cache=False).last_hidden_state
                loss = self.head_loss(hidden_states, model.lm_head.weight, tokens[:, 1:])
            (loss / self.micro_steps).backward()
            losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.stack(losses).mean()
        return self.loss


def measure(name: str, context: int, micro_tokens: int) -> dict:
    """Speed and peak memory of a model at a context."""
    torch.cuda.reset_peak_memory_stats()
    # A table of learned positions, if the model has one, is as long as the context
    model = make_model(name, {**SIZES, "max_position_embeddings": context})
    training = Training(model, context, TOKENS, micro_tokens)
    with softmax_by(name):
        times = [wall_time(training.step) for _ in range(WARMUP_STEPS + STEPS)]
    loss = training.loss.item()
    if not math.isfinite(loss):
        raise SystemExit(f"{name} at context {context} has the loss {loss}; no speed is reported.")
    seconds = statistics.median(times[WARMUP_STEPS:])
    return {
        "tokens_per_second": TOKENS / seconds,
        "ms_per_step": 1e3 * seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_step_seconds": times[0],  # compilation
        "parameters": model.num_parameters(),
        "loss": loss,
    }


def tables(content: dict) -> str:
    """Speed and memory by context, and where softmax is ahead."""
    rows, found = {(row["model"], row["context"]): row for row in Results.of(content).rows.values()}, []
    names = {name: name for name in MODELS}
    fields = {"tokens_per_second": ("tokens per second", ",.0f"), "peak_memory_gib": ("peak memory in GiB", ".1f")}
    for field, (title, form) in fields.items():
        cells = {key: f"{row[field]:{form}}" for key, row in rows.items() if field in row}
        found += pivot(f"{title} at context", CONTEXTS, names, cells)
    speeds = {key: row["tokens_per_second"] for key, row in rows.items() if "tokens_per_second" in row}
    for name in filter(lambda name: name.startswith("GMA"), names):
        both = [n for n in CONTEXTS if (name, n) in speeds and (SOFTMAX, n) in speeds]
        if both:
            ratios = {n: speeds[name, n] / speeds[SOFTMAX, n] for n in both}
            lost = [n for n, ratio in ratios.items() if ratio < 1] or "none of these"
            shown = ", ".join(f"{ratio:.2f} at {n:,}" for n, ratio in ratios.items())
            found[-1] += f"\n{name}: speed / speed of softmax {shown}; softmax is ahead at {lost}"
    return "\n\n".join(found)


def run(options: argparse.Namespace) -> None:
    os.environ[ENVIRONMENT_VARIABLE] = options.backend
    setting = {**SIZES, "tokens_per_step": TOKENS, "micro_tokens": options.micro_tokens, "backend": options.backend}
    setting |= {"dtype": "float32 weights, bfloat16 autocast", "steps": STEPS}
    results = Results(options.output, "kernels.training_gpu", setting, one_device=True)
    for context in sorted(options.contexts):
        for name in options.models:
            row = partial(measure, name, context, options.micro_tokens)
            results.measure({"model": name, "context": context}, or_refused, row)


def add_options(add) -> None:
    add("--contexts", type=int, nargs="+", choices=CONTEXTS, default=CONTEXTS)
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--micro_tokens", type=int, default=TOKENS, help="per forward pass, but at least a sequence")
    add("--backend", choices=["auto", *available_backends()], default="triton", help="of the GMA layers")


def main() -> None:
    command(__doc__, "gpu_training_*", add_options, run, tables, needs_gpu=True)


if __name__ == "__main__":
    main()
