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
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lib.results import Results, add_output_options, need_gpu, output_path, stored
from benchmarks.lib.tables import pivot
from benchmarks.lib.timing import first_line, free_memory
from gma_hf import GMAConfig, GMAForCausalLM
from gma_hf.ops import available_backends
from gma_hf.ops.dispatch import ENVIRONMENT_VARIABLE


SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_components": 64,
    "vocab_size": 8192,
}
MODELS = {
    "GMA gated": ("gated", "linear_attention"),
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
    """A model in training.

    Args:
        model: on its device.
        context: tokens per sequence.
        tokens: tokens per step.
        micro_tokens: tokens per forward pass, at least a sequence; gradients are accumulated over the step.
        compile: the blocks, the last norm and the head.
    """

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
    times = []
    forced = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "FlashAttention" in name else contextlib.nullcontext()
    with forced:
        for _ in range(WARMUP_STEPS + STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = training.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
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
    for title, field, form in (
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
        ("peak memory in GiB", "peak_memory_gib", "{:.1f}"),
    ):

        def cell(name: str, context: int, field: str = field, form: str = form) -> str:
            value = results.get(field, model=name, context=context)
            return "" if value is None else form.format(value)

        found += pivot(f"{title} at context", CONTEXTS, names, cell)
    for name in names:
        speeds = {
            context: [results.get("tokens_per_second", model=rival, context=context) for rival in (SOFTMAX, name)]
            for context in CONTEXTS
        }
        both = {context: pair for context, pair in speeds.items() if None not in pair}
        if name.startswith("GMA") and both:
            ratios = ", ".join(f"{own / softmax:.2f} at {context:,}" for context, (softmax, own) in both.items())
            lost = [context for context, (softmax, own) in both.items() if softmax > own]
            found[-1] += f"\n{name}: speed / speed of softmax {ratios}; softmax is ahead at {lost or 'none of these'}"
    return "\n\n".join(found)


def main() -> None:
    """Measure and print the tables; every measurement goes to the JSON file at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", choices=CONTEXTS, default=CONTEXTS)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--micro_tokens", type=int, default=TOKENS, help="per forward pass, but at least a sequence")
    parser.add_argument(
        "--backend", choices=["auto", *available_backends()], default="triton", help="of the GMA layers"
    )
    add_output_options(parser, "gpu_training_*")
    options = parser.parse_args()
    if not options.table:
        need_gpu()
        os.environ[ENVIRONMENT_VARIABLE] = options.backend
        options.output = output_path(options)
        setting = {
            **SIZES,
            "tokens_per_step": TOKENS,
            "micro_tokens": options.micro_tokens,
            "dtype": "float32 weights, bfloat16 autocast",
            "backend": options.backend,
            "steps": STEPS,
        }
        results = Results(options.output, "kernels.training_gpu", setting, one_device=True)

        def row(name: str, context: int) -> dict:
            free_memory()
            try:
                return measure(name, context, options.micro_tokens)
            except torch.cuda.OutOfMemoryError as error:
                return {"refused": first_line(error)}

        for context in sorted(options.contexts):
            for name in options.models:
                results.measure({"model": name, "context": context}, lambda n=name, c=context: row(n, c))
    for path in stored(options):
        print(f"\n{path}\n\n{tables(json.loads(path.read_text()))}")


if __name__ == "__main__":
    main()
