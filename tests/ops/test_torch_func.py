# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""torch.func on models and operators: gradients as functions, per-sample gradients, stateless calls."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from gma_hf import GMAForCausalLM, GMAForMaskedLM
from gma_hf.ops import gaussian_mixture_attention
from gma_hf.ops.triton_support import INSTALLED
from tests.conftest import make_model, tiny_config

from .kernels import DEVICE
from .problems import Problem, assert_close


OPERATOR = {
    "paper": {},
    "gated": {"normalize": False, "decay": True, "weights": True},
    "correlated": {"correlate": True, "decay": True, "weights": True},
    "bidirectional": {"causal": False, "weights": True},
    "resumed": {"state": True},
}


# What the kernels are tried on: they do not know correlated routes
FUSED = [case for case in OPERATOR if case != "correlated"] if DEVICE == "cpu" and INSTALLED else []
CALLS = [("chunked", case) for case in OPERATOR] + [("triton", case) for case in FUSED]
TOLERANCE = {"chunked": 1e-12, "triton": 2e-5}


def problem_of(backend: str, case: str, **values) -> tuple[Problem, dict[str, torch.Tensor]]:
    """A problem and its tensors, in the precision that a way can have."""
    problem = Problem(**OPERATOR[case], **values)
    tensors = problem.tensors()
    return problem, tensors if backend == "chunked" else {name: x.float() for name, x in tensors.items()}


def loss_of(problem: Problem, tensors: dict[str, torch.Tensor], backend: str) -> torch.Tensor:
    return sum(x.sin().sum() for x in problem.run(tensors, backend=backend).values())


@pytest.mark.parametrize(("backend", "case"), CALLS)
def test_grad_of_the_operator_is_what_backward_gives(backend, case):
    problem, tensors = problem_of(backend, case)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    loss_of(problem, leaves, backend).backward()
    expected = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    actual = grad(lambda values: loss_of(problem, values, backend))(tensors)
    assert_close(expected, actual, TOLERANCE[backend])


@pytest.mark.parametrize(("backend", "case"), CALLS)
def test_a_mapped_call_is_many_calls(backend, case):
    """Every tensor has a further dimension, wherever it stands."""
    several = [problem_of(backend, case, seed=seed)[1] for seed in range(3)]
    problem = problem_of(backend, case)[0]
    stacked = {name: torch.stack([tensors[name] for tensors in several], dim=1) for name in several[0]}
    mapped = vmap(lambda values: problem.run(values, backend=backend), in_dims=1)(stacked)
    for i, tensors in enumerate(several):
        expected = problem.run(tensors, backend=backend)
        assert_close(expected, {name: x[i] for name, x in mapped.items()}, TOLERANCE[backend])


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("backend", ["auto", "triton"] if FUSED else ["auto"])
def test_a_gradient_through_a_mapped_call_is_not_lost(backend, length):
    """Inside of `vmap` no tensor tells that a gradient is asked for outside. One token has a way of its own."""
    problem, tensors = problem_of("triton", "gated", length=length)
    stacked = {name: torch.stack([x, 0.5 * x]) for name, x in tensors.items()}

    def loss(values, backend):
        return vmap(lambda part: loss_of(problem, part, backend))(values).sum()

    expected, actual = (grad(lambda x: loss(x, way))(stacked) for way in ("reference", backend))  # noqa: B023
    # Without a state the decay of the first token has a gradient of 0, up to rounding errors of numbers around 1
    assert_close(expected, actual, 2e-5, floor=1.0)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("case", OPERATOR)
def test_forward_mode_gives_the_slope(case, length):
    """The slope along a direction is what the gradient says of it; ways without forward mode are passed over."""
    problem = Problem(**OPERATOR[case], length=length)
    tensors = problem.tensors()
    tensors.pop("log_decay", None)  # a total forgetting, -inf, has no direction
    generator = torch.Generator().manual_seed(1)
    direction = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in tensors.items()}
    _, slope = jvp(lambda values: loss_of(problem, values, "auto"), (tensors,), (direction,))
    slopes = grad(lambda values: loss_of(problem, values, "chunked"))(tensors)
    expected = sum((slopes[name] * direction[name]).sum() for name in tensors)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize("case", MODELS)
def test_the_product_of_a_hessian_and_a_vector(case):
    """Forward mode over reverse mode, as optimisers of second order use it: equal to the difference of two gradients."""
    model, parameters, _, loss = model_and_loss(case)
    parameters = {name: x.double() for name, x in parameters.items()}
    model.double()
    tokens = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    direction = {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in parameters.items()
    }
    slopes = grad(loss)
    _, product = jvp(lambda values: slopes(values, tokens), (parameters,), (direction,))
    step = 1e-4
    forwards, backwards = (
        slopes({name: x + sign * step * direction[name] for name, x in parameters.items()}, tokens) for sign in (1, -1)
    )
    difference = {name: (forwards[name] - backwards[name]) / (2 * step) for name in parameters}
    # The norms of a model round to float32: a few times 6e-8, over the step. A part without tangents would be wrong by its size
    assert_close(difference, product, 2e-2)


@pytest.mark.parametrize("backend", ["chunked", "triton"] if FUSED else ["chunked"])
def test_what_is_not_possible_is_an_error_that_says_the_way_out(backend):
    """Forward mode through a way that was chosen by name, and second derivatives in reverse mode."""
    problem = Problem(length=20)
    tensors = {name: x.float() for name, x in problem.tensors().items()}
    query = tensors.pop("query")

    def output(query, backend):
        return gaussian_mixture_attention(query, **tensors, backend=backend)

    with pytest.raises(ValueError, match=r"no forward-mode derivative. Use 'auto' or one of .*'reference'"):
        jvp(lambda x: output(x, backend), (query,), (torch.ones_like(query),))
    # The definition has both: central differences in float64, with an error of step^2 and rounding of 1e-16 / step
    exact, step, direction = {name: x.double() for name, x in tensors.items()}, 1e-6, torch.randn_like(query).double()

    def definition(query):
        return gaussian_mixture_attention(query, **exact, backend="reference")

    def difference(function):
        ahead, behind = (function(query.double() + sign * step * direction) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    _, tangent = jvp(definition, (query.double(),), (direction,))
    torch.testing.assert_close(tangent, difference(definition), rtol=1e-6, atol=1e-8)

    def slope(query):
        return grad(lambda x: output(x, backend).sin().sum())(query).square().sum()

    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*reference"):
        grad(slope)(query)

    def slope_of_definition(query):
        return grad(lambda x: definition(x).sin().sum())(query).square().sum()

    second = (grad(slope_of_definition)(query.double()) * direction).sum()
    torch.testing.assert_close(second, difference(slope_of_definition), rtol=1e-5, atol=1e-8)
    leaf = query.clone().requires_grad_()
    (first,) = torch.autograd.grad(output(leaf, backend).sin().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.square().sum().backward()


def test_forward_mode_passes_over_the_kernels(monkeypatch):
    """Of a model whose every operator has kernels that could run."""
    tokens = torch.randint(3, 90, (2, 1), generator=torch.Generator().manual_seed(0))
    for case in ("gated", "windowed"):
        _, parameters, _, loss = model_and_loss(case)
        with torch.no_grad():
            _, slope = jvp(lambda values: loss(values, tokens), (parameters,), (parameters,))  # noqa: B023
        slopes = grad(loss)(parameters, tokens)
        torch.testing.assert_close(slope, sum((slopes[name] * x).sum() for name, x in parameters.items()))
