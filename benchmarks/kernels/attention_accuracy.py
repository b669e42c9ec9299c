# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of a GMA backend beside `chunked` in the same dtype, both against `chunked` in float64 on the same inputs."""

import math

import torch
from torch import Tensor

from benchmarks.rivals import operators
from benchmarks.rivals.operators import CORRELATED, GATES, MIXTURE, NORMALISED, QKV, UNNORMALISED, Shape


SHAPE = Shape(batch=2, length=1024, heads=4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A gradient this much smaller than the one that comes in is zero to any training run: where responsibilities are one-hot,
# those of queries, keys and mixture are 1e-10 and less, and made of nothing but rounding.
NEGLIGIBLE = 1e-6


def outliers(x: dict[str, Tensor]) -> None:
    """2% of the queries and keys far outside the mixture."""
    for name in ("query", "key"):
        x[name][torch.rand(x[name].shape[:3], device=x[name].device) < 0.02] *= 100


def near_zero_variances(x: dict[str, Tensor]) -> None:
    """softplus(-20) = 2e-9: only the variance floor is left."""
    x["raw_variances"].fill_(-20)


def one_hot_priors(x: dict[str, Tensor]) -> None:
    """One component takes everything."""
    x["prior_logits"][:, 0] = 50


def padding(x: dict[str, Tensor]) -> None:
    """A row of padding alone, and tokens of padding in the others: they neither write nor forget."""
    for name in set(GATES) & set(x):
        x[name][0] = 0
        x[name][1:, :, ::7] = 0


BLOCKS = {
    "plain": (QKV + MIXTURE, NORMALISED),
    "gated": (QKV + MIXTURE + GATES, UNNORMALISED),
    "correlated": (QKV + MIXTURE + GATES, CORRELATED),
}
# Case: inputs, the read, and what is done to the inputs
CASES = {name: (*block, lambda x: None) for name, block in BLOCKS.items()}
for change in (outliers, near_zero_variances, one_hot_priors):
    CASES |= {f"{change.__name__.replace('_', ' ')}, {name}": (*block, change) for name, block in BLOCKS.items()}
CASES["padding, plain"] = (QKV + MIXTURE + GATES[:1], NORMALISED, padding)
CASES["padding, gated"] = (*BLOCKS["gated"], padding)
CASES["padding, correlated"] = (*BLOCKS["correlated"], padding)


ORDINARY = [case for case in CASES if case in BLOCKS or case.startswith("padding")]  # all others are extreme


def measure_case(
    case: str, dtype: torch.dtype, backend: str = "triton", shape: Shape = SHAPE, device: str = "cuda"
) -> dict:
    """
    Errors of output and gradients in `dtype`, of the backend and of `chunked`, and the largest ratio of the two. An error is
    relative to the norm of the float64 result. A ratio compares with at least what rounding the exact result to `dtype` costs,
    an eighth of the machine epsilon or more; results that `dtype` cannot hold are left out.
    """
    names, options, change = CASES[case]
    inputs = {k: x.detach() for k, x in operators.make_inputs(names, shape, torch.float32, device).items()}
    torch.manual_seed(7)
    change(inputs)
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    grad = operators.random_grad(shape, dtype, device)
    exact = operators.exact(names, options, inputs, grad)
    computed = [operators.evaluate(operators.gma(names, options, b), inputs, grad) for b in (backend, "chunked")]
    negligible, limits = NEGLIGIBLE * grad.double().norm(), torch.finfo(dtype)
    errors, ratios = {}, {}
    for name, expected in exact.items():
        if expected.abs().max() <= limits.max:
            scale = torch.maximum(expected.norm(), negligible)
            errors[name] = [((found[name] - expected).norm() / scale).item() for found in computed]
            ratio = errors[name][0] / max(errors[name][1], limits.eps / 8)
            ratios[name] = ratio if math.isfinite(ratio) else math.inf
    worst = max(ratios, key=ratios.get)
    return {"worst_ratio": ratios[worst], "worst_in": worst, "errors": errors}
