# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The decoding kernel takes the steps of the recurrence: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from gma_hf.ops import gaussian_mixture_attention
from gma_hf.ops.attention.call import AttentionCall
from gma_hf.ops.attention.recurrent import SHORT

from .kernels import DEVICE, KernelProblem
from .problems import assert_close


pytest.importorskip("triton", reason="Triton has no wheel for this platform")

EVERYTHING = {"weights": True, "decay": True, "state": True}
CASES = {
    "first token": {"length": 1},
    "next token": {"length": 1, **EVERYTHING},
    "next token, unnormalised": {"length": 1, "normalize": False, **EVERYTHING},
    "some tokens": {"length": SHORT, "packed": True, **EVERYTHING},
    "next token, normaliser": {"length": 1, "normalizer": True, **EVERYTHING},
    "grouped": {
        "length": 3,
        "normalizer": True,
        "key_heads": 2,
        "mixtures_per_key_head": 2,
        "queries_per_mixture": 2,
        **EVERYTHING,
    },
    "correlated": {"length": 3, "components": 12, "queries_per_mixture": 2, "correlate": True, **EVERYTHING},
    "large": {"length": 2, "normalizer": True, "components": 70, "routing_dim": 70, "value_dim": 65, "state": True},
}


def run(problem: KernelProblem, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    tensors = {name: x.to(dtype) for name, x in problem.tensors().items()}
    with torch.no_grad():
        return problem.run(tensors, backend=backend)


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_recurrence(case):
    problem = KernelProblem(**CASES[case])
    assert_close(run(problem, torch.float64, "reference"), run(problem, torch.float32, "triton"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_lose_no_more_than_their_own_rounding(dtype):
    problem = KernelProblem(**CASES["next token"])
    expected, actual = run(problem, dtype, "recurrent"), run(problem, dtype, "triton")
    assert actual["output"].dtype == dtype and actual["S"].dtype == torch.float32
    # The recurrence in PyTorch computes in float32 as well: outputs differ by a rounding of the last digit at most
    assert_close({name: x.double() for name, x in expected.items()}, actual, torch.finfo(dtype).eps)


@pytest.mark.quick
def test_padding_may_hold_anything():
    problem = KernelProblem(length=2, weights=True, state=True)
    tensors = {name: x.to(DEVICE, torch.float32) for name, x in problem.tensors().items()}
    tensors["write_weight"][..., -1] = 0.0
    with torch.no_grad():
        expected = problem.run(tensors, backend="triton")
        tensors["value"][..., -1, :] = torch.nan
        actual = problem.run(tensors, backend="triton")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.quick
def test_the_given_state_stays_as_it_is():
    problem = KernelProblem(**CASES["next token"])
    tensors = {name: x.to(DEVICE, torch.float32) for name, x in problem.tensors().items()}
    S, z = tensors["S"].clone(), tensors["z"].clone()
    with torch.no_grad():
        problem.run(tensors, backend="triton")
    assert torch.equal(tensors["S"], S) and torch.equal(tensors["z"], z)


def test_a_step_with_gradients_has_them():
    problem = KernelProblem(length=1, **EVERYTHING)
    tensors = {name: x.to(DEVICE, torch.float32).requires_grad_() for name, x in problem.tensors().items()}
    output = problem.run(tensors, backend="triton")["output"]
    assert output.requires_grad


@pytest.mark.quick
def test_the_operator_can_be_compiled_and_exported():
    problem = KernelProblem(**CASES["next token"])
    tensors = {name: x.to(DEVICE, torch.float32) for name, x in problem.tensors().items()}
    state = (tensors.pop("S"), tensors.pop("z"))

    def step(S, z):
        return gaussian_mixture_attention(**tensors, initial_state=(S, z), output_final_state=True, backend="triton")

    with torch.no_grad():
        expected = step(*state)
        actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*state)
    torch.testing.assert_close(actual, expected)
    arguments = [tensors.get(name) for name in AttentionCall._fields[:6]]
    arguments += [tensors["write_weight"], tensors["log_decay"].expand(-1, 1, -1), *state, 1e-6, 1e-4]
    fused_decoding = torch.ops.gma_hf.fused_decoding.default
    for output_normalizer in (False, True):
        torch.library.opcheck(
            fused_decoding, [*arguments, output_normalizer, False], test_utils=("test_schema", "test_faketensor")
        )
