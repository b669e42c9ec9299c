# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The fused kernels compute the operator: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import gma_hf
from gma_hf.ops import gaussian_mixture_attention
from tests.conftest import make_model, tiny_config

from . import problems as problems_module
from .kernels import DEVICE, GATED, HALF_CASES, KernelProblem, half_errors, half_problem
from .problems import QKV, Problem, assert_close, few_examples, problems


pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from gma_hf.ops import triton_support
from gma_hf.ops.attention import fused
from gma_hf.ops.attention.call import WAYS
from gma_hf.ops.attention.triton import passes, plan


# float32 rounds at 6e-8; sums over 100 tokens and 64 products amplify it by some tens, a small denominator by more.
SINGLE = 2e-5
EVERYTHING = {"weights": True, "decay": True, "state": True}
CORRELATED = {"correlate": True, **EVERYTHING}
MANY_BLOCKS = {"length": 33, "components": 40, "routing_dim": 130, "value_dim": 70}
# A chunk is 32 tokens in float32
SINGLE_CASES = {
    "plain": {"length": 65},
    "unnormalised": {"length": 40, "normalize": False},
    "everything": {"length": 63, **EVERYTHING},
    "everything, normaliser": {"length": 63, "queries_per_mixture": 2, "normalizer": True, **EVERYTHING},
    "normaliser alone": {"length": 40, "normalizer": True},
    "everything, unnormalised": {"length": 64, "normalize": False, **EVERYTHING},
    "packed": {"length": 65, "packed": True},
    "packed, everything": {"length": 40, "packed": True, "batch": 2, **EVERYTHING},
    "grouped": {"length": 40, "mixtures_per_key_head": 2, "queries_per_mixture": 2, **EVERYTHING},
    "key heads": {"length": 40, "key_heads": 2, "queries_per_mixture": 2, "decay": True},
    "bidirectional": {"length": 40, "query_length": 70, "causal": False},
    "bidirectional, everything": {
        "length": 70, "query_length": 40, "causal": False, "weights": True, "state": True, "normalize": False,
        "mixtures_per_key_head": 2, "queries_per_mixture": 2,
    },
    "bidirectional, normaliser": {
        "length": 40, "query_length": 70, "causal": False, "weights": True, "normalizer": True, "queries_per_mixture": 2,
    },
    "packed bidirectional": {"length": 40, "causal": False, "packed": True, "weights": True, "normalizer": True},
    "packed bidirectional, unnormalised": {"length": 33, "causal": False, "packed": True, "normalize": False},
    "few components, wide values": {"length": 40, "batch": 1, "components": 8, "value_dim": 70, **EVERYTHING},
    "few components, wide values, bidirectional": {
        "length": 33, "batch": 1, "components": 8, "value_dim": 128, "causal": False,
    },
    "one token": {"length": 1, **EVERYTHING},
    "one token, bidirectional": {"length": 1, "causal": False, "weights": True},
    "one component": {"length": 40, "components": 1, **EVERYTHING},
    "130 components": {"length": 33, "components": 130, "routing_dim": 20, "value_dim": 24, **EVERYTHING},
    "correlated": {"length": 65, "components": 12, **CORRELATED},
    "correlated, grouped": {
        "length": 40, "components": 12, "mixtures_per_key_head": 2, "queries_per_mixture": 2, **CORRELATED,
    },
    "correlated, packed": {"length": 40, "components": 12, "packed": True, **CORRELATED},
    "correlated, two components": {"length": 40, "components": 2, "correlate": True},
    "correlated, bidirectional": {
        "length": 40, "query_length": 70, "components": 12, "causal": False, "correlate": True, "weights": True,
        "state": True, "queries_per_mixture": 2,
    },
    "correlated, many blocks": {**MANY_BLOCKS, **CORRELATED},
    "many blocks": {**MANY_BLOCKS, "normalizer": True, **EVERYTHING},
    "many blocks, shared keys": {**MANY_BLOCKS, "length": 9, "components": 20, "mixtures_per_key_head": 2},
    "many value blocks, bidirectional": {
        "length": 9, "query_length": 20, "components": 40, "routing_dim": 20, "value_dim": 140, "causal": False,
        "normalizer": True,
    },
}  # fmt: skip
ROUTED = ("query", "key", "means", "raw_variances", "prior_logits")
QUICK = ("everything", "correlated", "everything, normaliser", "grouped", "bidirectional", "packed bidirectional")


def marked(cases, quick):
    """The names of the cases, some of them marked as quick."""
    return [pytest.param(case, marks=pytest.mark.quick if case in quick else ()) for case in cases]


def assert_same_bits(expected, actual):
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.fixture(scope="module")
def expected():
    """Results of `everything()`."""
    return everything().results(torch.float32, backend="triton")


def everything() -> KernelProblem:
    """Every feature, two chunks."""
    return KernelProblem(length=40, batch=1, queries_per_mixture=2, **EVERYTHING)


@pytest.mark.parametrize("case", marked(SINGLE_CASES, QUICK))
def test_float32_equals_the_definition(case):
    problem = KernelProblem(**{"batch": 1} | SINGLE_CASES[case])
    expected = problem.results(backend="reference")
    # Logits grow with the number of dimensions that they sum over, and with them what float32 rounds off
    tolerance = SINGLE * max(1, problem.routing_dim / 64)
    actual = problem.results(torch.float32, backend="triton")
    if problem.components <= (2 if problem.correlate else 1):
        # What is routed does not matter, or only its sign does: in the gradients behind it terms as large as the values' cancel
        behind = [{name: found.pop(f"grad {name}") for name in ROUTED} for found in (expected, actual)]
        assert_close(*behind, tolerance, floor=expected["grad value"].norm().item())
    assert_close(expected, actual, tolerance)


@settings(few_examples, max_examples=4, phases=[Phase.generate])  # to shrink a failure would take minutes
@given(
    problems(max_length=70, batch=1, key_heads=1, queries_per_mixture=1),
    st.integers(1, 20),
    st.integers(1, 40),
)
def test_float32_equals_the_definition_for_any_call(problem, routing_dim, components):
    problem = KernelProblem(**vars(problem) | {"routing_dim": routing_dim, "components": components})
    expected = problem.results(backend="reference")
    assert_close(expected, problem.results(torch.float32, backend="triton"), SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", marked(HALF_CASES, ("gated", "outliers")))
def test_half_precision_is_at_most_twice_as_wrong_as_chunked(case, dtype):
    """Both against float64 on the same inputs. Where `chunked` happens to be luckier, its error counts as an eighth of
    the machine epsilon: rounding the exact result to `dtype` costs about a fifth of it. Results that `dtype` cannot hold
    are left out: a first weight after nothing has a gradient of 1 / eps = 1e6."""
    problem, limits = half_problem(case, dtype), torch.finfo(dtype)
    exact = {name: x for name, x in problem.results(backend="reference").items() if x.abs().max() <= limits.max}
    plain, fused = (problem.results(dtype, backend=name) for name in ("chunked", "triton"))
    plain, fused = (half_errors(exact, {name: results[name] for name in exact}) for results in (plain, fused))
    # Of rho, responsibilities that are nearly 0 keep few bits: with one-hot priors the gradient of the keys is made of these
    factor = 4 if case == "correlated, one-hot priors" else 2
    # The state is float32 made of products of float16 numbers, which round at 2^-12 each
    allowed = {name: 1e-3 if name in ("S", "z") else factor * max(plain[name], limits.eps / 8) for name in exact}
    assert {name: (fused[name], allowed[name]) for name in exact if not fused[name] <= allowed[name]} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", ["key", "value"])
def test_padding_never_writes(held, dtype):
    """A token of weight 0 changes no other token's output or gradient, whatever it holds; its own gradients are 0."""
    problem = KernelProblem(length=40, batch=1, components=16, routing_dim=16, value_dim=16)
    padded = torch.arange(40) % 7 == 3
    results = []
    for factor in (1.0, 1e20):
        tensors = problem.tensors() | {"write_weight": (~padded).double().view(1, 1, -1)}
        tensors[held][:, :, padded] *= factor
        leaves = {name: x.to(DEVICE, dtype).requires_grad_() for name, x in tensors.items()}
        output = gaussian_mixture_attention(**leaves, backend="triton")
        grads = dict(zip(leaves, torch.autograd.grad(output.sin().sum(), list(leaves.values())), strict=True))
        assert all((grads[name][:, :, padded] == 0).all() for name in ("key", "value"))
        grads["write_weight"] = grads["write_weight"][..., ~padded]
        results.append({"output": output.detach(), **grads})
    assert_close(*results, torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "features",
    [
        {"length": 70, "normalizer": True, **EVERYTHING},
        {"length": 70, "causal": False, "weights": True, "normalizer": True},
        {**MANY_BLOCKS, "length": 9, **GATED},
        {"length": 70, "components": 12, **CORRELATED},
        {**MANY_BLOCKS, "length": 9, **CORRELATED},
    ],
)
def test_the_same_call_gives_the_same_bits_whatever_fresh_memory_holds(features):
    """PyTorch fills fresh memory with NaN the second time, so that whatever is read before it is written shows."""
    problem = KernelProblem(batch=1, **features)
    expected = problem.results(torch.bfloat16, backend="triton")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        actual = problem.results(torch.bfloat16, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(expected, actual)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "features",
    [
        {"length": 70},
        {"length": 150, "queries_per_mixture": 2, "normalizer": True, **EVERYTHING},
        {**MANY_BLOCKS, "length": 65, **GATED},
        {"length": 150, "components": 12, **CORRELATED},
    ],
    ids=["plain", "everything", "many blocks", "correlated"],
)
def test_few_sequences_and_many_give_the_same_results(features, dtype, monkeypatch):
    """A sequence that has to be cut into segments to fill the chip, and one of so many that it need not be."""
    problem = KernelProblem(batch=1, **features)
    results = []
    for multiprocessors in (1, 100):
        monkeypatch.setattr(plan, "multiprocessors", lambda index, count=multiprocessors: count)
        results.append({name: x.double() for name, x in problem.results(dtype, backend="triton").items()})
    # In 16 bits both round every result once, and what they compute with to 11 bits
    assert_close(*results, SINGLE if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("components", [5, 150])
def test_without_gradients_the_outputs_are_the_same(components):
    """Inference keeps nothing for a backward pass. A mixture of one tile of components, and a larger one."""
    problem = KernelProblem(length=40, batch=1, components=components, routing_dim=40, value_dim=8, **EVERYTHING)
    tensors = {name: x.float() for name, x in problem.tensors().items()}
    with_gradients = problem.results(torch.float32, backend="triton")
    with torch.no_grad():
        alone = problem.run(tensors, backend="triton")
    assert_same_bits({name: with_gradients[name] for name in alone}, alone)


def test_strides_do_not_matter_and_inputs_are_not_modified(expected):
    problem = everything()
    tensors = {name: x.float() for name, x in problem.tensors().items()}
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()}
    versions = {name: x._version for name, x in strided.items()}
    problem.tensors = lambda: strided
    assert_same_bits(expected, problem.results(torch.float32, backend="triton"))
    assert versions == {name: x._version for name, x in strided.items()}
    assert_same_bits(tensors, strided)


def test_inputs_may_be_views_that_repeat_elements():
    problem = KernelProblem(length=40, key_heads=2)
    tensors = {name: x.float() for name, x in problem.tensors().items()}
    tensors["query"] = tensors["query"][:1].expand(2, -1, -1, -1)
    tensors["value"] = tensors["value"][:, :1].expand(-1, 2, -1, -1)
    tensors["write_weight"] = torch.tensor(0.7).expand(2, 2, 40)
    tensors["log_decay"] = torch.tensor([-0.1]).expand(2, 1, 40)
    assert_close(problem.run(tensors, backend="chunked"), problem.run(tensors, backend="triton"), SINGLE)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_segments_do_not_show(length, monkeypatch):
    """Chunks of a segment: how many decides which states are kept, not what is computed."""
    problem = KernelProblem(length=100, batch=1, **EVERYTHING)
    expected = problem.results(backend="reference")
    monkeypatch.setattr(passes, "segment_length", lambda *arguments: length)
    assert_close(expected, problem.results(torch.float32, backend="triton"), SINGLE)


@pytest.mark.parametrize("split", [1, 32, 50])
def test_split_anywhere_and_resume(split):
    problem = KernelProblem(length=70, batch=1, queries_per_mixture=2, **EVERYTHING)
    tensors = {name: x.float() for name, x in problem.tensors().items()}
    whole = problem.run(tensors, backend="triton")
    sliced = (*QKV, "write_weight", "log_decay")
    first = {name: x[:, :, :split] if name in sliced else x for name, x in tensors.items()}
    second = {name: x[:, :, split:] if name in sliced else x for name, x in tensors.items()}
    head = problem.run(first, backend="triton")
    tail = problem.run(second | {"S": head["S"], "z": head["z"]}, backend="triton")
    joined = {"output": torch.cat([head["output"], tail["output"]], dim=2), "S": tail["S"], "z": tail["z"]}
    assert_close({name: x.double() for name, x in whole.items()}, joined, SINGLE)


@pytest.mark.parametrize(
    "features",
    [EVERYTHING, CORRELATED, {"causal": False, "query_length": 30}, {"normalizer": True, "queries_per_mixture": 2}],
)
def test_pytorch_finds_the_operator_well_formed(features):
    """Schema, shapes without data, autograd, and differentiation ahead of time with fixed and with open sizes."""
    problem = KernelProblem(length=20, batch=1, **features)
    tensors = {name: x.float().to(DEVICE).requires_grad_() for name, x in problem.tensors().items()}
    names = (*QKV, "means", "raw_variances", "prior_logits", "write_weight", "log_decay", "S", "z")
    arguments = (
        *(tensors.get(name) for name in names),
        problem.causal,
        False,
        None if problem.correlate else 1e-6,
        1e-4,
        True,
        True,
        problem.normalizer,
        problem.correlate,
    )
    torch.library.opcheck(torch.ops.gma_hf.fused_attention.default, arguments)


@pytest.mark.quick
@pytest.mark.parametrize(
    "sizes", [{"mixtures_per_key_head": 2, "queries_per_mixture": 2}, {"components": 40, "routing_dim": 130}]
)
def test_gradients_lie_in_memory_as_their_inputs_do(sizes):
    """What the fake implementation tells the compiler, which relies on it: heads of a token side by side."""
    problem = Problem(length=5, batch=2, key_heads=2, **sizes)
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    for name in QKV:
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [tensors[name].requires_grad_() for name in QKV]
    output = problem.run(tensors, backend="triton")["output"]
    for x, grad in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert grad.stride() == x.stride()


COMPILED_CASES = {
    "everything": {**EVERYTHING, "packed": True, "normalizer": True},
    "bidirectional": {"causal": False, "weights": True},
}


@pytest.mark.parametrize("case", marked(COMPILED_CASES, ("everything",)))
def test_compiles_into_one_graph_forward_and_backward(case, monkeypatch):
    torch._dynamo.reset()
    problem = KernelProblem(length=20, batch=1, **COMPILED_CASES[case])
    expected = problem.results(torch.float32, backend="triton")
    compiled = torch.compile(gaussian_mixture_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(problems_module, "gaussian_mixture_attention", compiled)
    assert_same_bits(expected, problem.results(torch.float32, backend="triton"))


def test_new_lengths_do_not_recompile():
    torch._dynamo.reset()
    fused = partial(gaussian_mixture_attention, backend="triton")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (70, 33, 100):
        tensors = {name: x.float().to(DEVICE) for name, x in Problem(length=length, batch=1).tensors().items()}
        with torch._dynamo.config.patch(error_on_recompile=length != 70):
            assert torch.equal(compiled(**tensors), fused(**tensors))


def test_autocast_does_not_touch_the_operator(expected):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same_bits(expected, everything().results(torch.float32, backend="triton"))


def test_gradient_checkpointing_gives_the_same_gradients(expected):
    problem = everything()
    run = problem.run
    problem.run = lambda tensors, **options: checkpoint(run, tensors, use_reentrant=False, **options)
    assert_same_bits(expected, problem.results(torch.float32, backend="triton"))


@pytest.mark.parametrize("block", ["paper", "gated-gqa", "correlated"])
def test_a_model_learns_the_same(block, monkeypatch):
    """Logits, loss and every gradient of a language model."""
    tokens = torch.randint(3, 99, (1, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for name in ("chunked", "triton"):
        monkeypatch.setenv("GMA_HF_BACKEND", name)
        model = make_model(gma_hf.GMAForCausalLM, tiny_config(block, num_hidden_layers=1)).to(DEVICE)
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"logits": outputs.logits.detach(), "loss": outputs.loss.detach(), **grads})
    # A route of unit length blows up what rounding does to it
    assert_close(*results, 4 * SINGLE if block == "correlated" else SINGLE)


UNABLE = {
    "float64": ({}, "must all be float32, all float16 or all bfloat16"),
    "mixed": ({"dtype": torch.float32, "value": torch.bfloat16}, "must all be float32, all float16 or all bfloat16"),
    "components": ({"dtype": torch.float32, "components": 300}, "more than 256 components"),
    "routing_dim": ({"dtype": torch.float32, "routing_dim": 300}, "dimension is above 256"),
    "value_dim": ({"dtype": torch.float32, "value_dim": 300}, "dimension is above 256"),
    "state": (
        {"dtype": torch.float32, "components": 256, "routing_dim": 80},
        "components times dimension are above 16384",
    ),
    "empty": ({"dtype": torch.float32, "length": 0}, "a tensor is empty"),
}


@pytest.mark.parametrize("unable", list(UNABLE))
def test_what_the_kernels_cannot_run_is_an_error_with_the_reason(unable):
    sizes, reason = dict(UNABLE[unable][0]), UNABLE[unable][1]
    dtype, value_dtype = sizes.pop("dtype", torch.float64), sizes.pop("value", None)
    tensors = {name: x.to(DEVICE, dtype) for name, x in Problem(**{"length": 5, **sizes}).tensors().items()}
    tensors["value"] = tensors["value"].to(value_dtype or dtype)
    with pytest.raises(ValueError, match=f"'triton' cannot run this call: .*{reason}.*'chunked'"):
        gaussian_mixture_attention(**tensors, backend="triton")
    gaussian_mixture_attention(**tensors, backend="auto")


def test_auto_never_chooses_the_interpreter(monkeypatch):
    def refuse(call):
        raise AssertionError("the interpreter was chosen")

    monkeypatch.setattr(WAYS, "ways", (WAYS.ways[0]._replace(run=refuse), *WAYS.ways[1:]))
    for length, causal in ((1, True), (100, True), (100, False)):
        tensors = {name: x.float() for name, x in Problem(length=length).tensors().items()}
        gaussian_mixture_attention(**tensors, causal=causal)


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_support, "INSTALLED", False)
    with pytest.raises(ValueError, match="pip install triton"):
        gaussian_mixture_attention(**{name: x.float() for name, x in Problem().tensors().items()}, backend="triton")


PROGRAM = """
import sys
import torch
import gma_hf
assert not [name for name in sys.modules if name.startswith("gma_hf.ops.attention.triton")]
x = torch.ones(1, 1, 3, 2)
gma_hf.gaussian_mixture_attention(x, x, x, x[0], x[0], x[0, :, :, 0])
assert not [name for name in sys.modules if name.startswith("gma_hf.ops.attention.triton")]
gma_hf.gaussian_mixture_attention(x, x, x, x[0], x[0], x[0, :, :, 0], backend="triton")
"""


def test_kernels_are_imported_when_they_run_and_run_on_a_cpu_when_asked(monkeypatch):
    """Only gma_hf.ops.attention.triton imports Triton. (PyTorch's compiler does as well, which Transformers imports.)"""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    reason = "ValueError: Backend 'triton' cannot run this call: the kernels run on GPUs"
    assert run.stderr.strip().splitlines()[-1].startswith(reason), run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


def hopper_case(components: str, dtype: str) -> None:
    """See `tests/hopper.py`."""
    fused.missing = lambda *device: None
    plan.multiprocessors = lambda index: 132  # of an H100
    sizes = {"components": int(components), "routing_dim": 64, "value_dim": 64, "batch": 1}
    problem = KernelProblem(length=300, correlate=True, weights=True, decay=True, **sizes)
    problem.results(getattr(torch, dtype))
    with torch.no_grad():
        problem = KernelProblem(length=1, correlate=True, weights=True, decay=True, state=True, **sizes)
        problem.run({name: x.to(getattr(torch, dtype)) for name, x in problem.tensors().items()})
        for features in ({"correlate": True, "weights": True, "decay": True}, {"normalizer": True}):
            problem = KernelProblem(length=300, state=True, packed=True, states=True, **features, **sizes)
            problem.run({name: x.to(getattr(torch, dtype)) for name, x in problem.tensors().items()})


@pytest.mark.parametrize(
    ("components", "dtype", "forward"),
    [
        ("64", "bfloat16", ["write_kernel", "scan_kernel", "fused_read_kernel"]),
        (
            "128",
            "bfloat16",
            ["responsibilities_kernel", "states_kernel", "scan_kernel", "states_kernel", "read_kernel"],
        ),
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_there(components, dtype, forward, tmp_path):
    """The interpreter takes programs that the compiler refuses: a variable that exists in one case only, say."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.hopper", __name__, components, dtype]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    backward = ["responsibilities_kernel", "states_kernel", "scan_kernel", "states_kernel", "gradient_kernel"]
    backward += ["logit_gradients_kernel", "coefficients_backward_kernel"]
    # Packed sequences with a state each: one launch, or batches
    found, last = run.stdout.split(), len(backward) + len(forward) + 2
    assert found[:last] == ["coefficients_kernel", *forward, *backward, "decode_kernel"]
    if "fused_read_kernel" in forward:
        assert found[last:] == ["coefficients_kernel", "fused_read_kernel"] * 2
    else:
        assert (
            {"states_kernel", "read_kernel"} <= set(found[last:]) <= {"coefficients_kernel", *forward, "decode_kernel"}
        )
