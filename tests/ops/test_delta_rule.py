# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""With the delta rule, a token writes what the memory does not say yet for its key, however the call is computed."""

import pytest
import torch
from hypothesis import given

from gma_hf.ops import gaussian_mixture_affinity, gaussian_mixture_attention
from gma_hf.ops.attention.mixture import mixture_coefficients, repeat_heads, responsibilities

from .problems import MIXTURE, Problem, assert_close, few_examples, problems


EXACT = 1e-9  # float64


def token_by_token(problem: Problem, tensors: dict) -> dict:
    """The definition: u_t = beta_t (v_t - a_t rho(k_t) S), then S = a_t S + w_t rho(k_t) u_t^T, then rho(q_t) S."""
    mixtures, length = problem.mixtures, problem.length
    coefficients = mixture_coefficients(*(tensors[name] for name in MIXTURE), 1e-4, torch.float64)
    key, value = (repeat_heads(tensors[name], mixtures) for name in ("key", "value"))
    rho_key = responsibilities(key, coefficients, problem.correlate)
    rho_query = responsibilities(tensors["query"], coefficients, problem.correlate).unflatten(1, (mixtures, -1))
    ones = torch.ones(problem.batch, mixtures, length, dtype=torch.float64)
    weight = tensors.get("write_weight", ones)
    log_decay = repeat_heads(tensors["log_decay"], mixtures) if "log_decay" in tensors else 0 * ones
    ids = problem.sequence_ids()
    if ids is not None:
        starts = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0))[:, None]
        log_decay = log_decay.masked_fill(starts, -torch.inf)
    decay, strength = log_decay.exp(), tensors["delta_strength"]
    S = tensors.get("S", torch.zeros(problem.batch, mixtures, problem.components, problem.value_dim).double())
    outputs = []
    for t in range(length):
        S = decay[:, :, t, None, None] * S
        known = torch.einsum("bmc,bmcd->bmd", rho_key[:, :, t], S)
        correction = strength[:, :, t, None] * (value[:, :, t] - known)
        S = S + weight[:, :, t, None, None] * rho_key[:, :, t, :, None] * correction[:, :, None]
        outputs.append(torch.einsum("bmrc,bmcd->bmrd", rho_query[:, :, :, t], S))
    return {"output": torch.stack(outputs, dim=3).flatten(1, 2), "S": S}


@pytest.mark.quick
@few_examples
@given(problem=problems(delta=True))
def test_every_token_writes_what_the_memory_does_not_say_yet(problem):
    """Grouped heads, write weights, total forgetting, packed sequences, states, lengths around the chunks."""
    leaves = {name: x.requires_grad_() for name, x in problem.tensors().items()}
    expected = token_by_token(problem, leaves)
    generator = torch.Generator().manual_seed(1)
    directions = {name: torch.randn(x.shape, generator=generator).double() for name, x in expected.items()}
    results = []
    for found in (expected, problem.run(leaves)):
        found = {name: found[name] for name in directions}
        loss = sum((found[name] * direction).sum() for name, direction in directions.items())
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        results.append(found | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    assert_close(*results, EXACT)


@pytest.mark.parametrize("backend", ["triton", "chunked", "recurrent", "reference"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_every_backend_computes_it(backend, length):
    problem = Problem(length=length, delta=True, correlate=True, decay=True, state=True, key_heads=2)
    dtype, tolerance = (torch.float32, 1e-5) if backend == "triton" else (torch.float64, EXACT)
    tensors = problem.tensors()
    with torch.no_grad():
        expected = token_by_token(problem, tensors)
        found = problem.run({name: x.to(dtype) for name, x in tensors.items()}, backend=backend)
    assert_close(expected, {name: found[name] for name in expected}, tolerance)


@pytest.mark.quick
def test_a_token_of_strength_one_is_read_back_exactly():
    """Also when the memory held something else for its key."""
    torch.manual_seed(0)
    mixture = torch.randn(1, 8, 4).double(), torch.randn(1, 8, 4).double(), torch.randn(1, 8).double()
    key, value = torch.randn(1, 1, 30, 4).double(), torch.randn(1, 1, 30, 5).double()
    key[:, :, -1] = key[:, :, 3]  # the last token has the key of an earlier one
    output = gaussian_mixture_attention(
        key, key, value, *mixture, normalize=False, correlate=True, delta_strength=torch.ones(1, 1, 30).double()
    )
    # A route is of unit length up to the epsilon of the correlation
    torch.testing.assert_close(output, value, rtol=0, atol=1e-5)


@pytest.mark.quick
def test_a_sequence_in_pieces_equals_the_whole_and_sequences_stay_apart():
    problem = Problem(length=70, delta=True, correlate=True, decay=True, batch=1)
    tensors = problem.tensors()
    whole = problem.run(tensors)
    options = {"normalize": False, "correlate": True, "output_final_state": True}
    state, outputs = None, []
    for start, stop in ((0, 1), (1, 30), (30, 31), (31, 70)):
        part = {n: x if n in MIXTURE else x[:, :, start:stop] for n, x in tensors.items()}
        output, state = gaussian_mixture_attention(**part, initial_state=state, **options)
        outputs.append(output)
    assert_close(whole, {"output": torch.cat(outputs, dim=2), "S": state[0], "z": state[1]}, EXACT)

    # Two sequences in a row, each with its own state, and padding
    ids = torch.tensor([[0] * 30 + [1] * 40])
    states = torch.randn(1, 2, 1, 5, 3).double(), torch.zeros(1, 2, 1, 5).double()
    packed, (S, _) = gaussian_mixture_attention(**tensors, sequence_ids=ids, initial_state=states, **options)
    for i, (start, stop) in enumerate(((0, 30), (30, 70))):
        part = {n: x if n in MIXTURE else x[:, :, start:stop] for n, x in tensors.items()}
        alone, last = gaussian_mixture_attention(**part, initial_state=(states[0][:, i], states[1][:, i]), **options)
        torch.testing.assert_close(packed[:, :, start:stop], alone, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(S[:, i], last[0], rtol=EXACT, atol=EXACT)


def test_padding_may_hold_anything():
    problem = Problem(length=70, delta=True, correlate=True, decay=True)
    tensors = problem.tensors()
    is_real = torch.arange(70) % 5 != 2
    tensors["write_weight"] = is_real.double().expand(2, 1, 70).clone()
    tensors["log_decay"] = torch.where(is_real, tensors["log_decay"].clamp(min=-1), 0.0)
    expected = problem.run(tensors)["output"][:, :, is_real]
    for name in ("key", "value"):
        tensors[name] = torch.where(is_real[:, None], tensors[name], torch.nan)
    torch.testing.assert_close(problem.run(tensors)["output"][:, :, is_real], expected, rtol=EXACT, atol=EXACT)


def test_half_precision_has_the_error_of_its_digits():
    problem = Problem(length=200, delta=True, correlate=True, decay=True, components=16, routing_dim=8, value_dim=16)
    tensors = problem.tensors()
    tensors["log_decay"] = tensors["log_decay"].clamp(min=-0.1)
    exact = problem.run(tensors)["output"]
    rounded = {name: x.bfloat16() if name in ("query", "key", "value") else x.float() for name, x in tensors.items()}
    again = problem.run({name: x.double() for name, x in rounded.items()})["output"]
    error = (problem.run(rounded)["output"].double() - again).norm() / again.norm()
    assert error < 0.02, error
    assert (again - exact).norm() / exact.norm() < 0.1


@pytest.mark.quick
def test_refusals_say_what_is_wrong():
    problem = Problem(delta=True)
    tensors = problem.tensors()
    with pytest.raises(ValueError, match=r"delta_strength.*normalize=False and causal=True"):
        gaussian_mixture_attention(**tensors)
    with pytest.raises(ValueError, match=r"delta_strength.*normalize=False and causal=True"):
        gaussian_mixture_attention(**tensors, normalize=False, causal=False)
    wrong = tensors | {"delta_strength": tensors["delta_strength"][..., :-1]}
    with pytest.raises(ValueError, match=r"delta_strength has shape \[2, 1, 19\]"):
        gaussian_mixture_attention(**wrong, normalize=False)
    with pytest.raises(ValueError, match="delta_strength is float"):
        gaussian_mixture_attention(**tensors | {"delta_strength": 0.5}, normalize=False)


def test_it_compiles_without_a_break_and_vmaps():
    problem = Problem(length=70, delta=True, correlate=True, decay=True, batch=3)
    tensors = problem.tensors()

    def run(delta_strength, value):
        others = {name: x for name, x in tensors.items() if name not in ("delta_strength", "value")}
        return gaussian_mixture_attention(
            **others, value=value, delta_strength=delta_strength, normalize=False, correlate=True, backend="chunked"
        )

    given_ = tensors["delta_strength"], tensors["value"]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given_), run(*given_), rtol=EXACT, atol=EXACT)

    # A derivative by torch.func equals that of autograd
    def loss(*given):
        return run(*given).square().sum()

    expected = torch.autograd.grad(loss(*(x.requires_grad_() for x in given_)), given_)
    found = torch.func.grad(loss, argnums=(0, 1))(*(x.detach() for x in given_))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.quick
def test_the_affinity_times_the_values_is_the_output():
    problem = Problem(length=30, delta=True, correlate=True, decay=True, packed=True)
    tensors = problem.tensors()
    value = tensors.pop("value")
    matrix = gaussian_mixture_affinity(**tensors, normalize=False, correlate=True, sequence_ids=problem.sequence_ids())
    expected = problem.run(tensors | {"value": value})["output"]
    torch.testing.assert_close(matrix @ value, expected, rtol=EXACT, atol=EXACT)
