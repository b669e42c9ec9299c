# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""All backends compute one operator: outputs, states and every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .problems import EPS, Problem, assert_close, errors, few_examples, problems


# float64 rounds at 1e-16. Resets clamp log-decays at -700, and cumulative sums of several of them round at 1e-12.
EXACT = 1e-11
# A route of unit length changes by what is left when terms cancel: of two components, by 1e-8 of them.
CANCELLED = 1e-9
# float32 rounds at 6e-8; sums over 100 tokens and 64 products amplify it by some tens, a small denominator by more.
SINGLE = 2e-5


def exact(problem: Problem) -> float:
    return CANCELLED if problem.correlate else EXACT


@few_examples
@given(problems())
def test_chunked_equals_the_definition_causally(problem):
    assert_close(problem.results(backend="reference"), problem.results(backend="chunked"), exact(problem))


@few_examples
@given(problems(max_length=40))
def test_recurrent_equals_the_definition(problem):
    assert_close(problem.results(backend="reference"), problem.results(backend="recurrent"), exact(problem))


@few_examples
@given(problems(causal=False, decay=False, packed=False), st.integers(1, 90))
def test_cross_attention_equals_the_definition(problem, query_length):
    problem.query_length = query_length
    assert_close(problem.results(backend="reference"), problem.results(backend="chunked"), exact(problem))


@few_examples
@given(problems(causal=False, decay=False, packed=True, state=False))
def test_packed_bidirectional_equals_the_definition(problem):
    assert_close(problem.results(backend="reference"), problem.results(backend="chunked"), exact(problem))


@pytest.mark.parametrize("length", [63, 64, 65, 512, 513, 1100])
def test_chunk_and_block_boundaries_do_not_show(length):
    problem = Problem(length=length, batch=1, weights=True, decay=True, state=True, normalizer=True)
    assert_close(problem.results(backend="reference"), problem.results(backend="chunked"), exact(problem))
    problem = Problem(length=length, batch=1, correlate=True, decay=True, weights=True)
    assert_close(problem.results(backend="reference"), problem.results(backend="chunked"), exact(problem))
    problem = Problem(length=length, batch=1)
    assert_close(problem.results(backend="reference"), problem.results(backend="chunked"), exact(problem))


@pytest.mark.parametrize("backend", ["reference", "chunked", "recurrent"])
def test_float32_is_accurate(backend):
    problem = Problem(length=130, weights=True, decay=True, state=True, queries_per_mixture=2, normalizer=True)
    assert_close(problem.results(), problem.results(torch.float32, backend=backend), SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("normalize", "correlate"), [(True, False), (False, False), (False, True)])
def test_half_precision_is_no_worse_than_plain_pytorch(dtype, normalize, correlate):
    """Plain PyTorch here is the definition in float32 on the same rounded inputs: what is left is their rounding."""
    features = {"correlate": True} if correlate else {"normalize": normalize}
    problem = Problem(length=200, components=16, routing_dim=16, value_dim=16, weights=True, **features)
    exact = problem.results()
    plain = errors(exact, problem.results(dtype, backend="reference"))
    fast = errors(exact, problem.results(dtype, backend="chunked"))
    assert all(fast[name] <= 2 * plain[name] for name in exact), (fast, plain)


@few_examples
@given(problems(max_length=60, packed=False), st.data())
def test_split_anywhere_and_resume(problem, data):
    split = data.draw(st.integers(0, problem.length))
    backends = [data.draw(st.sampled_from(["reference", "chunked", "recurrent"])) for _ in range(2)]
    whole = problem.run(problem.tensors(), backend="reference")
    sliced = ("query", "key", "value", "write_weight", "log_decay", "delta_strength")
    tensors = problem.tensors()
    first = {name: x[:, :, :split] if name in sliced else x for name, x in tensors.items()}
    second = {name: x[:, :, split:] if name in sliced else x for name, x in tensors.items()}
    head = problem.run(first, backend=backends[0])
    problem.state = True
    tail = problem.run(second | {"S": head["S"], "z": head["z"]}, backend=backends[1])
    joined = {name: torch.cat([x, tail[name]], dim=2) for name, x in head.items() if name not in ("S", "z")}
    joined |= {"S": tail["S"], "z": tail["z"]}
    assert_close(whole, joined, exact(problem))


@pytest.mark.parametrize("read", [{}, {"normalize": False}, {"correlate": True}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend, causal, read):
    problem = Problem(length=5, batch=1, queries_per_mixture=2, causal=causal, normalizer=True, state=True, weights=True,
                      components=3, routing_dim=2, value_dim=2, **read)  # fmt: skip
    tensors = problem.tensors()
    if causal:
        tensors["log_decay"] = -torch.rand(1, 1, 5, dtype=torch.float64)
    tensors["write_weight"] = tensors["write_weight"] + 0.1

    def outputs(*values):
        return tuple(problem.run(dict(zip(tensors, values, strict=True)), backend=backend).values())

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.quick
@pytest.mark.parametrize("features", [{}, {"causal": False}, {"causal": False, "packed": True, "state": False}])
@pytest.mark.parametrize("backend", ["reference", "chunked", "recurrent"])
def test_the_normaliser_is_what_the_unnormalised_read_is_divided_by(backend, features):
    """Minus eps it is what is read of values of one."""
    if backend == "recurrent" and features:
        backend = "auto"
    problem = Problem(**{"length": 70, "weights": True, "state": True, "queries_per_mixture": 2} | features)
    tensors = problem.tensors()
    tensors["value"][..., 0] = 1.0
    if problem.state:
        tensors["S"][..., 0] = tensors["z"]
    problem.normalize = False
    plain = problem.run(tensors, backend=backend)["output"]
    problem.normalize, problem.normalizer = True, True
    normalised = problem.run(tensors, backend=backend)
    assert_close({"D": plain[..., 0] + EPS}, {"D": normalised["normalizer"]}, EXACT)
    assert_close({"sum": plain}, {"sum": normalised["output"] * normalised["normalizer"].unsqueeze(-1)}, EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked", "recurrent"])
@pytest.mark.parametrize("length", [0, 1])
def test_shortest_lengths(backend, length):
    problem = Problem(length=length, weights=True, decay=True, state=True, normalizer=True)
    results = problem.results(backend=backend)
    assert results["output"].shape == (2, 1, length, 3)
    assert results["normalizer"].shape == (2, 1, length)
    assert_close(problem.results(backend="reference"), results, EXACT)
    if length == 0:
        assert torch.equal(results["S"], problem.tensors()["S"])


@pytest.mark.parametrize("backend", ["reference", "chunked", "recurrent"])
def test_strides_do_not_matter_and_inputs_are_not_modified(backend):
    problem = Problem(length=70, weights=True, decay=True, state=True, key_heads=2)
    tensors = problem.tensors()
    plain = problem.run(tensors, backend=backend)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()}
    versions = {name: x._version for name, x in strided.items()}
    assert_close(plain, problem.run(strided, backend=backend), EXACT)
    assert versions == {name: x._version for name, x in strided.items()}
    assert all(torch.equal(x, tensors[name]) for name, x in strided.items())


@pytest.mark.parametrize("backend", ["reference", "chunked", "recurrent"])
def test_uninitialised_memory_is_never_read(backend):
    """PyTorch fills fresh memory with NaN here, so that whatever is read before it is written shows."""
    problem = Problem(length=150, weights=True, decay=True, state=True, queries_per_mixture=2)
    expected = problem.results(backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_close(expected, problem.results(backend=backend), EXACT)
        bidirectional = Problem(length=150, causal=False, weights=True)
        assert all(x.isfinite().all() for x in bidirectional.results().values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("features", [{}, {"weights": True, "decay": True}, {"causal": False}])
def test_what_training_keeps_is_linear_in_length(features):
    """Bytes saved for the backward pass: q, k, v, gates, and one state per block; twice the length, twice the bytes."""

    def saved_bytes(length):
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        problem = Problem(length=length, batch=1, components=64, routing_dim=64, value_dim=64, **features)
        leaves = {name: x.float().requires_grad_() for name, x in problem.tensors().items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = problem.run(leaves, backend="chunked")["output"]
        return sum(sizes.values()), output

    short, _ = saved_bytes(2048)
    long, _ = saved_bytes(4096)
    assert long <= 2.02 * short
    # q, k, v are 3 * 4096 * 64 floats; states, gates and mixtures add less than a third of that.
    assert long <= 4 * 4096 * 64 * 4 * 1.02


def test_autocast_does_not_touch_the_operator():
    problem = Problem(length=100, weights=True, decay=True)
    expected = problem.results(torch.float32, backend="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = problem.results(torch.float32, backend="chunked")
    assert_close(expected, actual, 1e-6)


def test_state_is_float32_for_half_precision_inputs():
    problem = Problem(length=12, causal=True)
    tensors = {name: x.bfloat16() for name, x in problem.tensors().items()}
    problem.normalizer = True
    results = problem.run(tensors)
    assert results["output"].dtype == torch.bfloat16
    assert results["S"].dtype == results["z"].dtype == results["normalizer"].dtype == torch.float32
