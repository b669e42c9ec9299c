# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The operators that the benchmarks of `kernels` compare, and their inputs.

Every tensor has the shape [batch, heads, length, ...] that `gaussian_mixture_attention` and SDPA take, and lies in memory
as projections leave it, [batch, length, heads, ...]: what flash-linear-attention takes is the transposed view.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rivals.recurrences import FLA as BY_FLA
from benchmarks.rivals.recurrences import PLAIN as BY_PYTORCH
from benchmarks.rivals.recurrences import linear_attention, state_space
from gma_hf.ops import gaussian_mixture_attention


QKV = ("query", "key", "value")
MIXTURE = ("means", "raw_variances", "prior_logits")
GATES = ("write_weight", "log_decay")
IN_FLOAT32 = (*MIXTURE, *GATES, "dt", "rate")
MAMBA_STATE = 128
# Relative to the norm: some three roundings to bfloat16 of at most 2^-8 each
TOLERANCE = 1e-2


class Shape(NamedTuple):
    """Sizes of one call; values have the dimension of queries and keys."""

    batch: int
    length: int
    heads: int = 16
    dim: int = 64
    components: int = 64


def make_inputs(names: tuple[str, ...], shape: Shape, dtype: torch.dtype, device: str = "cuda") -> dict[str, Tensor]:
    """The named inputs as leaves: tokens in `dtype`, the mixture, write weights and head-wise decays in float32."""
    batch, length, heads, dim, components = shape

    def tokens(*sizes: int, random: Callable = torch.randn) -> Tensor:
        return random(batch, length, heads, *sizes, device=device).transpose(1, 2)

    def step() -> Tensor:
        torch.manual_seed(0)  # the gated block's step is both the write weight and, times a rate, the decay
        return 0.2 * tokens(random=torch.rand)

    make = {
        "query": lambda: tokens(dim),
        "key": lambda: tokens(dim),
        "value": lambda: tokens(dim),
        # A mixture after some training: means, variances and priors all differ
        "means": lambda: 0.7 * torch.randn(heads, components, dim, device=device),
        "raw_variances": lambda: 0.5 * torch.randn(heads, components, dim, device=device) + 0.5,
        "prior_logits": lambda: torch.randn(heads, components, device=device),
        "write_weight": step,
        "log_decay": lambda: -torch.linspace(1, 16, heads, device=device)[:, None] * step(),
        # Of flash-linear-attention's operators, distributed as its layers start
        "gate": lambda: F.logsigmoid(tokens(dim)) / 16,
        "slots": lambda: tokens(components).sigmoid(),
        "slot_gate": lambda: F.logsigmoid(tokens(components)) / 8,
        "beta": lambda: tokens().sigmoid(),
        # Of Mamba-2's layer of the same width: twice as many heads of the dimension, a state of 128, one group
        "x": lambda: torch.randn(batch, length, 2 * heads, dim, device=device),
        "B": lambda: torch.randn(batch, length, MAMBA_STATE, device=device),
        "C": lambda: torch.randn(batch, length, MAMBA_STATE, device=device),
        "dt": lambda: 0.1 * torch.rand(batch, length, 2 * heads, device=device),
        "rate": lambda: torch.linspace(1, 16, 2 * heads, device=device),
    }
    inputs = {}
    for seed, name in enumerate(make, start=1):
        if name in names:
            torch.manual_seed(seed)
            x = make[name]()
            inputs[name] = (x if name in IN_FLOAT32 else x.to(dtype)).detach().requires_grad_()
    return inputs


class Rival(NamedTuple):
    """An operator, the inputs that it uses and is differentiated in, the order of its time in the length, and if it needs a GPU."""

    function: Callable[[dict[str, Tensor]], Tensor]
    names: tuple[str, ...]
    order: int = 1
    needs_gpu: bool = False


def gma(names: tuple[str, ...], options: dict, backend: str | None = None) -> Rival:
    """On a backend by its name, so that nothing falls back unnoticed: the kernels on a GPU, `chunked` on a CPU."""

    def function(x: dict[str, Tensor]) -> Tensor:
        chosen = backend or ("triton" if x["query"].is_cuda else "chunked")
        return gaussian_mixture_attention(**x, **options, backend=chosen)

    return Rival(function, names)


def sdpa(x: dict[str, Tensor]) -> Tensor:
    """`scaled_dot_product_attention` as users call it; PyTorch chooses the backend, on Hopper cuDNN's."""
    return F.scaled_dot_product_attention(x["query"], x["key"], x["value"], is_causal=True)


def flash_attention(x: dict[str, Tensor]) -> Tensor:
    """The same, forced to PyTorch's FlashAttention-2 backend."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(x)


def fla(module: str, *names: str, **arguments) -> Rival:
    """`chunk_<module>` of flash-linear-attention, called with the named inputs after q, k, v.

    Imported when called: not installed, or refused by its own check of the Triton version, it is an error of that call.
    """

    def function(x: dict[str, Tensor]) -> Tensor:
        operator = getattr(importlib.import_module(f"fla.ops.{module}"), f"chunk_{module}")
        return operator(*(x[name].transpose(1, 2) for name in QKV + names), **arguments)[0].transpose(1, 2)

    return Rival(function, QKV + names, needs_gpu=True)


def elu_attention(x: dict[str, Tensor]) -> Tensor:
    query, key = (F.elu(x[name].float()) + 1 for name in ("query", "key"))
    return linear_attention(query, key, x["value"])


# The ways to call the operator: which inputs, and which read
NORMALISED, UNNORMALISED, CORRELATED = (
    {"normalize": True},
    {"normalize": False},
    {"normalize": False, "correlate": True},
)
VARIANTS = {
    "normalised": (QKV + MIXTURE, NORMALISED),
    "normalised, decay": (QKV + MIXTURE + GATES, NORMALISED),
    "un-normalised": (QKV + MIXTURE, UNNORMALISED),
    "un-normalised, decay": (QKV + MIXTURE + GATES, UNNORMALISED),
    "correlated, decay": (QKV + MIXTURE + GATES, CORRELATED),
}
GMA = {f"GMA {name}": gma(*variant) for name, variant in VARIANTS.items()}
# The blocks of the presets: the paper's, the gated and the correlated one
GMA_EXTREMES = ("GMA normalised", "GMA un-normalised, decay", "GMA correlated, decay")
SDPA = {
    "SDPA": Rival(sdpa, QKV, order=2),
    "SDPA flash": Rival(flash_attention, QKV, order=2, needs_gpu=True),
}
CHUNKED = {"GMA normalised, chunked": gma(*VARIANTS["normalised"], backend="chunked")}
# How tables name what results call otherwise
TITLES = {
    "SDPA": "SDPA, default",
    "SDPA flash": "SDPA forced to FlashAttention-2",
    "GMA normalised, chunked": "GMA normalised, plain PyTorch",
}
# In the order of importance: the last may take minutes to tune themselves
FLA = {
    "fla chunk_linear_attn": fla("linear_attn", normalize=False),
    "fla chunk_gla": fla("gla", "gate"),
    "fla chunk_simple_gla": fla("simple_gla", "log_decay"),
    "fla chunk_gated_delta_rule": fla("gated_delta_rule", "log_decay", "beta", use_qk_l2norm_in_kernel=True),
    "fla chunk_gsa": fla("gsa", "slots", "slot_gate"),
}
RECURRENCE = ("x", "dt", "rate", "B", "C")
PLAIN = {  # in plain PyTorch
    "linear attention": Rival(elu_attention, QKV),
    "Mamba-2": Rival(lambda x: state_space(**x, by=BY_PYTORCH), RECURRENCE),
}
MAMBA_BY_FLA = {"Mamba-2, fla": Rival(lambda x: state_space(**x, by=BY_FLA), RECURRENCE, needs_gpu=True)}
RIVALS = {**GMA, **SDPA, **FLA, **CHUNKED, **PLAIN, **MAMBA_BY_FLA}


def evaluate(rival: Rival, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every input, given the output's."""
    output = rival.function(inputs)
    return {
        "output": output,
        **dict(zip(inputs, torch.autograd.grad(output, list(inputs.values()), grad), strict=True)),
    }


def exact(names: tuple[str, ...], options: dict, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """What GMA gives by `chunked` in float64 for the same rounded numbers."""
    inputs = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return evaluate(gma(names, options, "chunked"), inputs, grad.double())


def random_grad(shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    """A gradient of the output, in the memory layout of the tokens."""
    torch.manual_seed(99)
    return torch.randn(shape.batch, shape.length, shape.heads, shape.dim, device=device).to(dtype).transpose(1, 2)


def measure_error(variant: str, shape: Shape, backend: str = "triton", device: str = "cuda") -> dict:
    """
    Largest error, relative to its norm, of the bfloat16 output and gradients against `chunked` in float64. SystemExit if it
    exceeds `TOLERANCE`, or is no number: a wrong operator has no speed.
    """
    names, options = VARIANTS[variant]
    inputs, grad = make_inputs(names, shape, torch.bfloat16, device), random_grad(shape, torch.bfloat16, device)
    actual = evaluate(gma(names, options, backend), inputs, grad)
    expected = exact(names, options, inputs, grad)
    errors = {name: ((actual[name] - x).norm() / x.norm()).item() for name, x in expected.items()}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise SystemExit(
            f"GMA {variant} with {shape} differs from float64 by {wrong}, relative to the norm; at most {TOLERANCE:g} is "
            "accepted, and no speed is reported."
        )
    return {"relative_error": max(errors.values())}
