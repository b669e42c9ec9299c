# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A decoding step in plain PyTorch is one token of the definition, in few calls."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gma_hf.ops.attention.mixture import mixture_coefficients
from gma_hf.ops.attention.recurrent import step, step_coefficients

from .problems import EPS, Problem, assert_close


EXACT = 1e-12  # float64: a token sums over components and dimensions only
EVERYTHING = {"weights": True, "decay": True, "state": True}
CASES = {
    "first token": {},
    "first token, weighted": {"weights": True, "decay": True},
    "paper": {"state": True},
    "paper, normaliser": {"state": True, "normalizer": True},
    "weighted": {"state": True, "weights": True},
    "gated": {**EVERYTHING, "normalize": False},
    "everything": {**EVERYTHING, "normalizer": True},
    "one sequence": {**EVERYTHING, "batch": 1, "normalizer": True},
    "one sequence, gated": {**EVERYTHING, "batch": 1, "normalize": False},
    "correlated": {**EVERYTHING, "correlate": True},
    "correlated, one sequence, grouped": {
        **EVERYTHING,
        "correlate": True,
        "batch": 1,
        "key_heads": 2,
        "mixtures_per_key_head": 2,
        "queries_per_mixture": 3,
    },
    "one component": {**EVERYTHING, "components": 1},
    "one dimension": {**EVERYTHING, "routing_dim": 1, "value_dim": 1},
    "grouped": {
        **EVERYTHING,
        "key_heads": 2,
        "mixtures_per_key_head": 2,
        "queries_per_mixture": 3,
        "normalizer": True,
    },
    "one key head": {**EVERYTHING, "mixtures_per_key_head": 4, "batch": 1},
    "shared mixtures": {**EVERYTHING, "key_heads": 2, "queries_per_mixture": 2, "batch": 1, "normalize": False},
}


def take_step(problem: Problem, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `step` returns, under the names of `Problem.run`."""
    dtype = torch.float64 if tensors["query"].dtype == torch.float64 else torch.float32
    coefficients = mixture_coefficients(
        tensors["means"], tensors["raw_variances"], tensors["prior_logits"], 1e-4, dtype
    )
    with torch.no_grad():
        result = step(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            step_coefficients(coefficients),
            write_weight=tensors.get("write_weight"),
            log_decay=tensors.get("log_decay"),
            state=(tensors["S"], tensors["z"]) if problem.state else None,
            normalize=problem.normalize,
            eps=EPS,
            output_normalizer=problem.normalizer,
            correlate=problem.correlate,
        )
    named = {"output": result.output, "S": result.state[0], "z": result.state[1]}
    return named | ({"normalizer": result.normalizer} if problem.normalizer else {})


def tensors_of(problem: Problem, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The tensors of one token; decays are given for each mixture or for all."""
    tensors = problem.tensors()
    if problem.decay and problem.key_heads > 1:
        tensors["log_decay"] = tensors["log_decay"].repeat_interleave(problem.mixtures_per_key_head, dim=1)
    state = {name: tensors.pop(name) for name in ("S", "z") if name in tensors}
    if problem.correlate:
        state["z"] = torch.zeros_like(state["z"])  # as every step with correlation leaves it
    return {name: x.to(dtype) for name, x in tensors.items()} | {
        name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in state.items()
    }


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_one_token_of_the_definition(case):
    problem = Problem(length=1, **CASES[case])
    tensors = tensors_of(problem)
    assert_close(problem.run(tensors, backend="reference"), take_step(problem, tensors), EXACT)
    with torch.no_grad():
        assert_close(problem.run(tensors, backend="reference"), problem.run(tensors, backend="recurrent"), EXACT)


@pytest.mark.parametrize("seed", range(4))
def test_forgetting_everything_is_exact(seed):
    problem = Problem(length=1, seed=seed, **EVERYTHING)
    tensors = tensors_of(problem)
    tensors["log_decay"] = torch.full_like(tensors["log_decay"], -torch.inf)
    actual = take_step(problem, tensors)
    fresh = {name: x for name, x in tensors.items() if name not in ("S", "z", "log_decay")}
    expected = Problem(length=1, weights=True).run(fresh, backend="reference")
    assert_close(expected, actual, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["gated", "everything", "paper", "grouped"])
def test_rounded_inputs_lose_nothing_more(case, dtype):
    """State and normaliser are those of float64 on the same rounded inputs, to float32; the output is rounded once."""
    problem = Problem(length=1, components=16, routing_dim=16, value_dim=8, **CASES[case])
    tensors = tensors_of(problem, dtype)
    expected = problem.run({name: x.double() for name, x in tensors.items()}, backend="reference")
    actual = take_step(problem, tensors)
    assert actual["output"].dtype == dtype
    assert actual["S"].dtype == actual["z"].dtype == torch.float32
    output = {"output": expected.pop("output")}, {"output": actual.pop("output")}
    assert_close(expected, actual, 2e-6)  # float32 rounds at 6e-8, logits are sums of 32 products
    assert_close(*output, 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_a_token_of_weight_zero_writes_nothing_whatever_its_value_holds(junk):
    problem = Problem(length=1, batch=3, **EVERYTHING)
    tensors = tensors_of(problem)
    tensors["write_weight"] = torch.ones_like(tensors["write_weight"])
    tensors["write_weight"][1] = 0.0
    expected = take_step(problem, tensors)
    tensors["value"][1] = junk
    actual = take_step(problem, tensors)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_far_outliers_and_tiny_variances_stay_finite():
    problem = Problem(length=1, **EVERYTHING)
    tensors = tensors_of(problem, torch.float32)
    tensors["key"] = tensors["key"] * 1e30
    tensors["query"][0] = torch.inf
    tensors["raw_variances"][:] = -30
    actual = take_step(problem, tensors)
    expected = problem.run(tensors, backend="reference")
    assert all(x.isfinite().all() for x in actual.values())
    assert_close({name: x.double() for name, x in expected.items()}, actual, 1e-5)


def test_inputs_are_not_modified():
    problem = Problem(length=1, batch=1, **EVERYTHING)
    tensors = tensors_of(problem)
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    take_step(problem, tensors)
    assert all(torch.equal(x, tensors[name]) for name, (x, _) in before.items())
    assert all(version == tensors[name]._version for name, (_, version) in before.items())


class Counter(TorchDispatchMode):
    """Counts calls into PyTorch."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("features", "most"),
    [
        ({"state": True}, 21),  # the paper's block
        ({**EVERYTHING, "normalize": False}, 25),  # the gated block
        ({**EVERYTHING, "normalizer": True}, 30),  # the memory behind a window
    ],
    ids=["paper", "gated", "window"],
)
def test_a_step_takes_few_calls(features, most):
    problem = Problem(length=1, batch=1, key_heads=4, components=16, routing_dim=16, value_dim=16, **features)
    tensors = tensors_of(problem, torch.float32)
    coefficients = step_coefficients(
        mixture_coefficients(tensors["means"], tensors["raw_variances"], tensors["prior_logits"], 1e-4, torch.float32)
    )
    with torch.no_grad(), Counter() as counter:
        step(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            coefficients,
            write_weight=tensors.get("write_weight"),
            log_decay=tensors.get("log_decay"),
            state=(tensors["S"], tensors["z"]),
            normalize=problem.normalize,
            output_normalizer=problem.normalizer,
        )
    assert len(counter.calls) <= most, counter.calls
