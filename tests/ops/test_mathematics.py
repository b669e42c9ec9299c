# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Facts that follow from the equations, and promises about extreme inputs."""

import itertools

import pytest
import torch
from hypothesis import given
from torch import Tensor

from gma_hf.ops import gaussian_mixture_affinity, gaussian_mixture_attention, gaussian_mixture_responsibilities

from .problems import EPS, MIXTURE, QKV, Problem, assert_close, few_examples, problems


EXACT = 1e-11  # float64, as in test_backends
BACKENDS = ["reference", "chunked", "recurrent"]


def attend(tensors: dict[str, Tensor], **options) -> Tensor:
    return gaussian_mixture_attention(**tensors, eps=EPS, **options)


def running_mean(value: Tensor) -> Tensor:
    """Mean of v_1 .. v_i, each shrunk by d / (d + eps) with d = i."""
    count = torch.arange(1, value.shape[2] + 1, dtype=value.dtype).view(-1, 1)
    return value.cumsum(dim=2) / (count + EPS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_component_is_the_running_mean(backend):
    tensors = Problem(length=90, components=1).tensors()
    torch.testing.assert_close(
        attend(tensors, backend=backend), running_mean(tensors["value"]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_certain_component_is_the_running_mean(backend):
    """With alpha = 100 larger than every log-density difference here, the other components weigh e^-90 or so."""
    tensors = Problem(length=90).tensors()
    tensors["raw_variances"] = torch.full_like(tensors["raw_variances"], 3.0)
    tensors["prior_logits"] = torch.tensor([[0.0, 100.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        attend(tensors, backend=backend), running_mean(tensors["value"]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_bidirectional_is_permutation_equivariant(backend):
    tensors = Problem(length=90).tensors()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    shuffled = {name: x[:, :, order] if name in QKV else x for name, x in tensors.items()}
    output, moved = (attend(x, causal=False, backend=backend) for x in (tensors, shuffled))
    torch.testing.assert_close(output[:, :, order], moved, rtol=1e-12, atol=1e-12)


@few_examples
@given(problems(normalize=True, allow_correlated=False, delta=False, state=False, packed=False))
def test_normalised_read_stays_inside_the_range_of_the_values(problem):
    """o is a convex combination of values, shrunk towards 0 by d / (d + eps)."""
    tensors = problem.tensors()
    output = problem.run(tensors, backend="chunked")["output"]
    value = tensors["value"]
    assert (output <= value.amax(dim=(1, 2), keepdim=True).clamp(min=0) + 1e-12).all()
    assert (output >= value.amin(dim=(1, 2), keepdim=True).clamp(max=0) - 1e-12).all()


@few_examples
@given(problems(state=False))
def test_affinity_times_values_is_the_output(problem):
    tensors = problem.tensors()
    output = problem.run(tensors, backend="chunked")["output"]
    value = tensors.pop("value")
    affinity = gaussian_mixture_affinity(
        **tensors,
        sequence_ids=problem.sequence_ids(),
        normalize=problem.normalize,
        eps=EPS,
        correlate=problem.correlate,
    )
    heads = output.shape[1] // value.shape[1]
    torch.testing.assert_close(affinity @ value.repeat_interleave(heads, dim=1), output, rtol=1e-9, atol=1e-11)
    assert problem.correlate or problem.delta or (affinity >= 0).all()
    assert (affinity.triu(1) == 0).all()


def test_affinity_has_the_rank_of_the_mixture_and_rows_of_unit_sum():
    tensors = Problem(length=60, batch=1).tensors()
    del tensors["value"]
    affinity = gaussian_mixture_affinity(**tensors, causal=False, eps=EPS)
    assert torch.linalg.matrix_rank(affinity[0, 0], rtol=1e-10) <= 5
    weight = gaussian_mixture_affinity(**tensors, causal=False, normalize=False).sum(dim=-1)
    torch.testing.assert_close(affinity.sum(dim=-1), weight / (weight + EPS), rtol=1e-12, atol=0)


def test_affinity_of_packed_bidirectional_sequences_is_block_diagonal():
    problem = Problem(length=60, causal=False, packed=True, weights=True)
    tensors = problem.tensors()
    output = problem.run(tensors)["output"]
    value = tensors.pop("value")
    affinity = gaussian_mixture_affinity(**tensors, causal=False, sequence_ids=problem.sequence_ids(), eps=EPS)
    torch.testing.assert_close(affinity @ value, output, rtol=1e-9, atol=1e-11)


def test_responsibilities_are_the_posterior_of_the_gaussian_mixture():
    """Bayes' rule with torch.distributions, densities evaluated directly."""
    tensors = Problem(length=30, key_heads=3).tensors()
    means, raw_variances, prior_logits = (tensors[name] for name in MIXTURE)
    scale = (torch.nn.functional.softplus(raw_variances) + 1e-4).sqrt()
    density = torch.distributions.Normal(means[:, None], scale[:, None]).log_prob(tensors["key"].unsqueeze(-2))
    expected = (density.sum(dim=-1) + prior_logits[:, None]).softmax(dim=-1)
    gamma = gaussian_mixture_responsibilities(tensors["key"], means, raw_variances, prior_logits)
    torch.testing.assert_close(gamma, expected, rtol=1e-9, atol=1e-12)


def test_gradient_is_modulated_by_the_responsibilities():
    """d gamma_c / dx = gamma_c (g_c - sum_j gamma_j g_j) with g_c = -(x - mu_c) / sigma_c^2."""
    tensors = Problem(length=1, batch=1).tensors()
    mixture = [tensors[name] for name in MIXTURE]
    x = tensors["key"]
    jacobian = torch.autograd.functional.jacobian(lambda y: gaussian_mixture_responsibilities(y, *mixture), x).view(
        5, 4
    )
    gamma = gaussian_mixture_responsibilities(x, *mixture).view(5, 1)
    g = -(x.view(1, 4) - mixture[0][0]) / (torch.nn.functional.softplus(mixture[1][0]) + 1e-4)
    torch.testing.assert_close(jacobian, gamma * (g - (gamma * g).sum(dim=0)), rtol=1e-9, atol=1e-12)


def test_routing_is_locally_stable():
    """||gamma(x) - gamma(x')|| <= ||x - x'|| times the largest spread of the g_c on the way between them."""
    tensors = Problem(length=200, key_heads=2).tensors()
    mixture = [tensors[name] for name in MIXTURE]
    x = tensors["key"]
    step = 1e-3 * tensors["query"]
    moved = gaussian_mixture_responsibilities(x + step, *mixture) - gaussian_mixture_responsibilities(x, *mixture)
    precision = 1 / (torch.nn.functional.softplus(mixture[1]) + 1e-4)
    points = [x + step * t for t in torch.linspace(0, 1, 5)]
    g = [-(point.unsqueeze(-2) - mixture[0][:, None]) * precision[:, None] for point in points]
    spread = torch.stack([(a.unsqueeze(-2) - a.unsqueeze(-3)).norm(dim=-1).amax(dim=(-1, -2)) for a in g]).amax(dim=0)
    assert (moved.norm(dim=-1) <= 1.01 * spread * step.norm(dim=-1)).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["left", "right", "scattered"])
@pytest.mark.parametrize("magnitude", [1.0, 1e4, 1e30])
def test_padding_never_writes(causal, padding, magnitude):
    """A token of weight 0 changes no other token's output or gradient, whatever it holds; its own gradients are 0."""
    problem = Problem(length=100, batch=1, causal=causal)
    generator = torch.Generator().manual_seed(5)
    real = {"left": torch.arange(100) >= 30, "right": torch.arange(100) < 70,
            "scattered": torch.rand(100, generator=generator) < 0.7}[padding]  # fmt: skip
    tensors = problem.tensors()
    alone = {name: x[:, :, real] if name in QKV else x for name, x in tensors.items()}
    for name in ("key", "value"):
        tensors[name] = torch.where(real[:, None], tensors[name], magnitude * tensors[name])
    tensors["write_weight"] = real.double().view(1, 1, -1)
    outputs, grads = [], []
    for arguments in (tensors, alone):
        leaves = {name: x.clone().float().requires_grad_() for name, x in arguments.items()}
        output = attend(leaves, causal=causal, backend="chunked")
        output = output[:, :, real] if "write_weight" in arguments else output
        outputs.append({"output": output.detach()})
        order = [*QKV, *MIXTURE]
        grads.append(
            dict(zip(order, torch.autograd.grad(output.sin().sum(), [leaves[n] for n in order]), strict=True))
        )
    assert all((grads[0][name][:, :, ~real] == 0).all() for name in ("key", "value"))
    grads[0] = {name: grad[:, :, real] if name in QKV else grad for name, grad in grads[0].items()}
    # float32: chunks fall on other tokens, so sums are rounded in another order.
    assert_close(outputs[1], outputs[0], 1e-5)
    assert_close(grads[1], grads[0], 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_written_reads_zero(backend):
    problem = Problem(length=80)
    leaves = {name: x.float().requires_grad_() for name, x in problem.tensors().items()}
    leaves["write_weight"] = torch.zeros(2, 1, 80, requires_grad=True)
    output = attend(leaves, backend=backend)
    assert (output == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), list(leaves.values())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_decay", [-torch.inf, -1e30, -100.0])
def test_a_reset_forgets_everything(backend, log_decay):
    """What comes after a reset equals a fresh start: exactly nothing of the past is left, even of huge values."""
    tensors = {name: x.float() for name, x in Problem(length=100, batch=1).tensors().items()}
    tensors["value"][:, :, :40] *= 1e20
    tensors["log_decay"] = torch.zeros(1, 1, 100)
    tensors["log_decay"][..., 40] = log_decay
    fresh = {name: x[:, :, 40:] if name in (*QKV, "log_decay") else x for name, x in tensors.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    output = attend(leaves, backend=backend)[:, :, 40:]
    torch.testing.assert_close(output, attend(fresh, backend=backend), rtol=1e-4, atol=1e-5)
    grads = dict(zip(leaves, torch.autograd.grad(output.sum(), list(leaves.values())), strict=True))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["key"][:, :, :40].abs() < 1e-6).all()
    assert (grads["log_decay"][..., 40].abs() < 1e-6).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_equals_separate(causal, backend):
    problem = Problem(length=130, batch=1, causal=causal, decay=causal, weights=True)
    tensors = problem.tensors()
    bounds = [0, 1, 50, 64, 90, 130]
    ids = torch.cat([torch.full((stop - start,), i) for i, (start, stop) in enumerate(itertools.pairwise(bounds))])
    packed = attend(tensors, causal=causal, sequence_ids=ids.unsqueeze(0), backend=backend)
    sliced = (*QKV, "write_weight", "log_decay", "delta_strength")
    separate = [
        attend({name: x[:, :, a:b] if name in sliced else x for name, x in tensors.items()}, causal=causal)
        for a, b in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(packed, torch.cat(separate, dim=2), rtol=1e-9, atol=1e-11)


def test_the_initial_state_belongs_to_the_first_sequence():
    problem = Problem(length=20, state=True)
    tensors = problem.tensors()
    state = (tensors.pop("S"), tensors.pop("z"))
    ids = (torch.arange(20) >= 8).long().expand(2, 20)
    output = attend(tensors, sequence_ids=ids, initial_state=state)
    without = attend(tensors, sequence_ids=ids)
    torch.testing.assert_close(output[:, :, 8:], without[:, :, 8:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(output[:, :, :8], without[:, :, :8])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extreme", ["outliers", "near-zero variances", "one-hot priors"])
def test_extremes_stay_finite_and_convex(backend, extreme):
    tensors = {name: x.float() for name, x in Problem(length=100, components=8).tensors().items()}
    if extreme == "outliers":
        tensors["query"], tensors["key"] = tensors["query"] * 1000, tensors["key"] * 1000
    elif extreme == "near-zero variances":
        tensors["raw_variances"] = torch.full_like(tensors["raw_variances"], -20.0)
    else:
        tensors["prior_logits"][:, 3] = 100.0
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    output = attend(leaves, backend=backend)
    assert output.abs().max() <= tensors["value"].abs().max() * (1 + 1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sin().sum(), list(leaves.values())))


def test_bfloat16_counts_do_not_saturate():
    """5,000 tokens of weight 1/64: a bfloat16 sum would stop at 4, where its spacing is 1/32."""
    tokens = 5000
    tensors = {name: x.bfloat16() for name, x in Problem(length=tokens, batch=1, components=1).tensors().items()}
    weight = torch.full((1, 1, tokens), 1 / 64, dtype=torch.bfloat16)
    _, (_, z) = attend(tensors, write_weight=weight, output_final_state=True)
    torch.testing.assert_close(z, torch.full((1, 1, 1), tokens / 64), rtol=1e-5, atol=0)


def correlations(problem: Problem) -> Tensor:
    """The affinity by correlation, of one sequence without weights."""
    tensors = problem.tensors()
    del tensors["value"]
    return gaussian_mixture_affinity(**tensors, causal=problem.causal, normalize=False, correlate=True)


def test_the_correlated_affinity_is_the_correlation_of_two_routes():
    """By Pearson's formula, computed by another library."""
    problem = Problem(length=12, batch=1, causal=False, components=6)
    tensors = problem.tensors()
    mixture = [tensors[name] for name in MIXTURE]
    routes = [gaussian_mixture_responsibilities(tensors[name], *mixture)[0, 0] for name in ("query", "key")]
    expected = torch.corrcoef(torch.cat(routes))[:12, 12:]
    torch.testing.assert_close(
        correlations(problem)[0, 0], expected, rtol=0, atol=1e-6
    )  # 1e-8 beside lengths of 0.1 and more


def test_a_token_correlates_with_itself_and_least_with_its_opposite():
    problem = Problem(length=30, batch=1, causal=False, components=2)
    tensors = problem.tensors()
    tensors["key"] = tensors["query"]
    affinity = gaussian_mixture_affinity(
        *(tensors[name] for name in ("query", "key", *MIXTURE)), causal=False, normalize=False, correlate=True
    )[0, 0]
    torch.testing.assert_close(affinity.diagonal(), torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-4)
    # Of two components every token prefers the one or the other
    assert ((affinity.abs() - 1).abs() < 1e-4).all() and (affinity < 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_correlation_needs_no_z(backend):
    problem = Problem(length=70, state=True, weights=True, decay=True, correlate=True)
    tensors = problem.tensors()
    expected = problem.run(tensors, backend=backend)
    tensors["z"] = tensors["z"] * 7
    actual = problem.run(tensors, backend=backend)
    assert torch.equal(expected["output"], actual["output"]) and torch.equal(expected["S"], actual["S"])
    assert not expected["z"].any() and not actual["z"].any()


def test_correlated_routes_do_not_depend_on_what_all_tokens_share():
    """A constant added to every value is read as it would be from routes alone: nothing of it where routes cancel."""
    problem = Problem(length=1, batch=1, components=4, correlate=True)
    tensors = problem.tensors()
    tensors["means"][:] = 0.0
    tensors["raw_variances"][:] = 0.0
    tensors["prior_logits"][:] = 0.0
    assert not problem.run(tensors)["output"].any()  # every component is the average component
