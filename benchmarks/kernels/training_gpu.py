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
import contextlib
import math
import os
import statistics
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lib.command import command
from benchmarks.lib.results import Results
from benchmarks.lib.tables import pivot
from benchmarks.lib.timing import first_line, free_memory, wall_time
from gma_hf import GMAConfig, GMAForCausalLM
from gma_hf.ops import available_backends
from gma_hf.ops.dispatch import ENVIRONMENT_VARIABLE


SIZES = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_components": 64, "vocab_size": 8192
}  # fmt: skip
MODELS = {
    "GMA gated": ("gated", "linear_attention"),
    "GMA correlated": ("correlated", "linear_attention"),
    "GMA paper": ("paper", "linear_attention"),
    "softmax + RoPE": ("gated", "full_attention"),
    "softmax + RoPE, FlashAttention-2": ("gated", "full_attention"),
}
SOFTMAX = "softmax + RoPE"
CONTEXTS = (1024, 4096, 16384, 65536)
TOKENS = 65536  # per step
WARMUP_STEPS, STEPS = 3, 8
# No token is padding; said outright, it spares every model the search for packed sequences
NO_MASK = {"full_attention": None, "linear_attention": None}


def make_model(name: str, context: int, sizes: dict = SIZES, device: str = "cuda") -> GMAForCausalLM:
    """The model with random float32 weights; a table of learned positions as long as the context, if it has one."""
    preset, layer_type = MODELS[name]
    layer_types = [layer_type] * sizes["num_hidden_layers"]
    config = GMAConfig.from_preset(preset, **sizes, layer_types=layer_types, max_position_embeddings=context)
    torch.manual_seed(0)
    with torch.device(device):
        return GMAForCausalLM(config).train()


def head_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the next token, a function of its own so that it is compiled in one piece with the head."""
    return F.cross_entropy(F.linear(hidden_states, weight).flatten(0, 1).float(), labels.flatten())


class Training:
    """A model in training: `tokens` per step, `micro_tokens` (at least a sequence) per forward pass."""

    def __init__(self, model: GMAForCausalLM, context: int, tokens: int, micro_tokens: int, compile: bool = True):
        self.model, self.context = model, context
        self.rows = max(1, micro_tokens // context)
        self.micro_steps = tokens // (self.rows * context)
        if self.micro_steps * self.rows * context != tokens:
            raise ValueError(f"{tokens} tokens per step are no whole number of {self.rows} x {context} tokens.")
        self.head_loss = head_loss
        if compile:
            torch._dynamo.reset()  # every context has shapes of its own: do not compile for shapes in general
            for module in (*model.model.layers, model.model.norm):
                module.compile(dynamic=False)
            self.head_loss = torch.compile(head_loss, dynamic=False)
        fused = model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

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
        return torch.stack(losses).mean()


def measure(name: str, context: int, micro_tokens: int) -> dict:
    """Speed and peak memory of a model at a context."""
    torch.cuda.reset_peak_memory_stats()
    model = make_model(name, context)
    training = Training(model, context, TOKENS, micro_tokens)
    forced = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "FlashAttention" in name else contextlib.nullcontext()
    with forced:
        times = [wall_time(training.step) for _ in range(WARMUP_STEPS + STEPS - 1)]
        losses: list[Tensor] = []
        times.append(wall_time(lambda: losses.append(training.step())))
    loss = losses[0]
    if not math.isfinite(loss.item()):
        raise SystemExit(f"{name} at context {context} has the loss {loss.item()}; no speed is reported.")
    seconds = statistics.median(times[WARMUP_STEPS:])
    return {
        "tokens_per_second": TOKENS / seconds,
        "ms_per_step": 1e3 * seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_step_seconds": times[0],  # compilation
        "parameters": model.num_parameters(),
        "loss": loss.item(),
    }


def tables(content: dict) -> str:
    """Speed and memory by context, and where softmax is ahead."""
    results, found = Results.of(content), []
    names = {name: name for name in MODELS if results.find(model=name)}
    fields = {"tokens_per_second": ("tokens per second", ",.0f"), "peak_memory_gib": ("peak memory in GiB", ".1f")}
    for field, (title, form) in fields.items():

        def cell(name: str, context: int, field: str = field, form: str = form) -> str:
            value = results.get(field, model=name, context=context)
            return "" if value is None else f"{value:{form}}"

        found += pivot(f"{title} at context", CONTEXTS, names, cell)
    for name in filter(lambda name: name.startswith("GMA"), names):
        pairs = {n: [results.get("tokens_per_second", model=x, context=n) for x in (SOFTMAX, name)] for n in CONTEXTS}
        pairs = {n: pair for n, pair in pairs.items() if None not in pair}
        if pairs:
            ratios = ", ".join(f"{own / softmax:.2f} at {n:,}" for n, (softmax, own) in pairs.items())
            lost = [n for n, (softmax, own) in pairs.items() if softmax > own] or "none of these"
            found[-1] += f"\n{name}: speed / speed of softmax {ratios}; softmax is ahead at {lost}"
    return "\n\n".join(found)


def run(options: argparse.Namespace) -> None:
    os.environ[ENVIRONMENT_VARIABLE] = options.backend
    setting = {**SIZES, "tokens_per_step": TOKENS, "micro_tokens": options.micro_tokens, "backend": options.backend}
    setting |= {"dtype": "float32 weights, bfloat16 autocast", "steps": STEPS}
    results = Results(options.output, "kernels.training_gpu", setting, one_device=True)

    def row(name: str, context: int) -> dict:
        free_memory()
        try:
            return measure(name, context, options.micro_tokens)
        except torch.cuda.OutOfMemoryError as error:
            return {"refused": first_line(error)}

    for context in sorted(options.contexts):
        for name in options.models:
            results.measure({"model": name, "context": context}, row, name, context)


def add_options(add) -> None:
    add("--contexts", type=int, nargs="+", choices=CONTEXTS, default=CONTEXTS)
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--micro_tokens", type=int, default=TOKENS, help="per forward pass, but at least a sequence")
    add("--backend", choices=["auto", *available_backends()], default="triton", help="of the GMA layers")


def main() -> None:
    command(__doc__, "gpu_training_*", add_options, run, tables, needs_gpu=True)


if __name__ == "__main__":
    main()
