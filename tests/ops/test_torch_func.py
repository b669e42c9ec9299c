# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""torch.func on models and operators: gradients as functions, per-sample gradients, stateless calls."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from gma_hf import GMAForCausalLM, GMAForMaskedLM
from gma_hf.ops import gaussian_mixture_attention
from tests.conftest import make_model, tiny_config

from .problems import Problem, assert_close


OPERATOR = {
    "paper": {},
    "gated": {"normalize": False, "decay": True, "weights": True},
    "correlated": {"correlate": True, "decay": True, "weights": True},
    "bidirectional": {"causal": False, "weights": True},
    "resumed": {"state": True},
}


def loss_of(problem: Problem, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(x.sin().sum() for x in problem.run(tensors, backend="chunked").values())


@pytest.mark.parametrize("case", OPERATOR)
def test_grad_of_the_operator_is_what_backward_gives(case):
    problem = Problem(**OPERATOR[case])
    tensors = problem.tensors()
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    loss_of(problem, leaves).backward()
    expected = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    assert_close(expected, grad(lambda values: loss_of(problem, values))(tensors), 1e-12)


@pytest.mark.parametrize("case", OPERATOR)
def test_a_mapped_call_is_many_calls(case):
    """Every tensor has a further dimension, wherever it stands."""
    problem = Problem(**OPERATOR[case])
    several = [Problem(**OPERATOR[case], seed=seed).tensors() for seed in range(3)]
    stacked = {name: torch.stack([tensors[name] for tensors in several], dim=1) for name in several[0]}
    mapped = vmap(lambda values: problem.run(values, backend="chunked"), in_dims=1)(stacked)
    for i, tensors in enumerate(several):
        expected = problem.run(tensors, backend="chunked")
        assert_close(expected, {name: x[i] for name, x in mapped.items()}, 1e-12)


MODELS = {
    "paper": (GMAForCausalLM, "paper", {}),
    "gated": (GMAForCausalLM, "gated", {}),
    "windowed": (GMAForCausalLM, "windowed", {}),
    "hybrid": (GMAForCausalLM, "hybrid", {"attn_implementation": "eager"}),
    "encoder": (GMAForMaskedLM, "gated", {"is_causal": False, "use_decay": False}),
}


def model_and_loss(case: str):
    model_class, block, values = MODELS[case]
    model = make_model(model_class, tiny_config(block, **values))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    options = {"use_cache": False} if model_class is GMAForCausalLM else {}

    def loss(parameters, tokens):
        return functional_call(model, parameters, (tokens,), options).logits.square().mean()

    return model, parameters, options, loss


@pytest.mark.parametrize("case", MODELS)
def test_per_sample_gradients_of_a_model_are_those_of_single_rows(case):
    model, parameters, options, loss = model_and_loss(case)
    tokens = torch.randint(3, 90, (3, 1, 10), generator=torch.Generator().manual_seed(0))
    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        model(row, **options).logits.square().mean().backward()
        expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        assert_close(expected, {name: x[i] for name, x in actual.items()}, 2e-5)


def test_what_is_not_possible_is_an_error():
    """Forward mode and second derivatives through the chunks, which the definition has."""
    problem = Problem(length=4)
    tensors = problem.tensors()
    query = tensors.pop("query")

    def output(query, backend):
        return gaussian_mixture_attention(query, **tensors, backend=backend)

    with pytest.raises(RuntimeError, match=r"jvp|forward"):
        jvp(lambda x: output(x, "chunked"), (query,), (torch.ones_like(query),))
    _, tangent = jvp(lambda x: output(x, "reference"), (query,), (torch.ones_like(query),))
    assert tangent.abs().sum() > 0

    def slope(query, backend):
        return grad(lambda x: output(x, backend).sin().sum())(query).square().sum()

    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*reference"):
        grad(lambda x: slope(x, "chunked"))(query)
    assert grad(lambda x: slope(x, "reference"))(query).abs().sum() > 0
    leaf = query.clone().requires_grad_()
    (first,) = torch.autograd.grad(output(leaf, "chunked").sin().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.square().sum().backward()
