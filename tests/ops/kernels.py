# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Problems that run where the fused kernels run: on a GPU, or else on the CPU in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import gma_hf
from tests.conftest import make_model, tiny_config

from .problems import Problem, errors


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class KernelProblem(Problem):
    """A problem whose tensors live on the CPU, and which is computed on DEVICE."""

    def sequence_ids(self) -> Tensor | None:
        ids = super().sequence_ids()
        return None if ids is None else ids.to(DEVICE)

    def run(self, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
        results = super().run({name: x.to(DEVICE) for name, x in tensors.items()}, **options)
        return {name: x.cpu() for name, x in results.items()}


@dataclass
class RoundedProblem(KernelProblem):
    """A problem whose inputs are exact in a 16-bit type: what is computed in it has the same inputs as in float64."""

    dtype: torch.dtype = torch.bfloat16
    change: Callable[[dict[str, Tensor]], None] | None = None  # what is done to the tensors before they are rounded

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        if self.change is not None:
            self.change(tensors)
        return {name: x.to(self.dtype).double() for name, x in tensors.items()}


def outliers(tensors: dict[str, Tensor]) -> None:
    """Some queries and keys far outside the mixture."""
    for name, first in (("query", 5), ("key", 7)):
        tensors[name][:, :, first::16] *= 100


def near_zero_variances(tensors: dict[str, Tensor]) -> None:
    """softplus(-20) = 2e-9: the floor alone is left."""
    tensors["raw_variances"].fill_(-20)


def one_hot_priors(tensors: dict[str, Tensor]) -> None:
    """One component takes nearly every token."""
    tensors["prior_logits"][:, 3] = 50


def padding(tensors: dict[str, Tensor]) -> None:
    """A row of padding alone."""
    tensors["write_weight"][0] = 0


GATED = {"weights": True, "decay": True, "normalize": False}
CORRELATED = {"weights": True, "decay": True, "correlate": True}
# Features of a problem, and what is done to its tensors
HALF_CASES = {
    "plain": ({}, None),
    "normaliser": ({"normalizer": True, "weights": True}, None),
    "gated": (GATED, None),
    "correlated": (CORRELATED, None),
    "correlated, outliers": (CORRELATED, outliers),
    "correlated, one-hot priors": (CORRELATED, one_hot_priors),
    "outliers": ({}, outliers),
    "near-zero variances": ({}, near_zero_variances),
    "one-hot priors": ({}, one_hot_priors),
    "one-hot priors, gated": (GATED, one_hot_priors),
    "packed bidirectional": ({"causal": False, "packed": True, "weights": True}, None),
    "a row of padding": ({"weights": True, "batch": 2}, padding),
}


def half_problem(case: str, dtype: torch.dtype) -> RoundedProblem:
    """Two chunks, which are longer in bfloat16, and enough numbers in every result for rounding errors to average."""
    features, change = HALF_CASES[case]
    length = 70 if dtype == torch.bfloat16 else 40
    sizes = {"batch": 1, "queries_per_mixture": 2, "components": 40, "routing_dim": 24, "value_dim": 20}
    return RoundedProblem(**(sizes | features), length=length, dtype=dtype, change=change)


def half_errors(exact: dict[str, Tensor], actual: dict[str, Tensor]) -> dict[str, float]:
    """`errors`, but no gradient that passes through logits counts as smaller than the keys'. With one-hot priors the
    queries' gradient vanishes, because terms of that size cancel: what is left in 16 bits is what these were rounded by."""
    floor = exact["grad key"].norm()
    found = errors(exact, actual)
    for name in ("grad query", "grad prior_logits"):
        found[name] *= min(1.0, (exact[name].norm().clamp(min=1e-3) / floor).item())
    return found


def what_a_model_learns(block: str) -> dict[str, Tensor]:
    """Logits, loss and every gradient of a language model of one layer, with padding."""
    tokens = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block, num_hidden_layers=1)).to(DEVICE)
    outputs = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    outputs.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": outputs.logits.detach() * mask[..., None], "loss": outputs.loss.detach(), **grads}
