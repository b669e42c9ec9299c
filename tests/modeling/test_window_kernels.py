# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The fused kernels compute the window: on a GPU where there is one, else in Triton's interpreter."""

import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.ops import dispatch
from gma_hf.ops.window import softmax as module
from gma_hf.ops.window.functional import window_softmax
from tests.conftest import make_model, tiny_config
from tests.modeling import window_problems
from tests.modeling.window_problems import KeysApart, WindowProblem
from tests.ops.kernels import DEVICE, what_a_model_learns
from tests.ops.problems import assert_close


pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from gma_hf.ops.window.triton import fused as window_fused


# float32 rounds at 6e-8; sums over some tens of tokens and dimensions amplify it by some tens
SINGLE = 2e-5


CASES = {
    "plain": WindowProblem(80, 40, key_heads=1),
    "everything": WindowProblem(40, 9, batch=2, key_heads=1, padded=True, packed=True, sinks=True, softcap=2.0),
    "bidirectional": WindowProblem(75, 20, causal=False, key_heads=1, repeats=1),
    "bidirectional, everything": WindowProblem(
        40, 3, causal=False, batch=2, key_heads=1, padded=True, packed=True, sinks=True, softcap=2.0
    ),
    "long window": WindowProblem(20, 70, key_heads=1),
    "window over everything": WindowProblem(33, 40, causal=False, key_heads=1),
    "window of one": WindowProblem(40, 1, key_heads=1),
    "one token": WindowProblem(1, 8, batch=2, padded=True),
    "whole": WindowProblem(90, 40, batch=2, key_heads=1, whole=True, sinks=True, softcap=2.0),
    "whole, packed": WindowProblem(75, 7, key_heads=1, whole=True, packed=True),
    "whole, bidirectional": WindowProblem(40, 9, causal=False, key_heads=1, whole=True),
    "whole, in the window": WindowProblem(20, 40, batch=2, key_heads=1, whole=True),
    "sink tokens": WindowProblem(40, 9, batch=2, whole=True, num_sink_tokens=3, sinks=True),
    "sink tokens, packed": WindowProblem(
        40, 9, batch=2, key_heads=1, padded=True, packed=True, num_sink_tokens=2, softcap=2.0
    ),
    "a first key": WindowProblem(80, 20, batch=2, whole=True, num_sink_tokens=1, leading=True, weighing=True),
    "first keys": WindowProblem(
        40, 9, key_heads=1, repeats=3, whole=True, num_sink_tokens=4, leading=True, sinks=True, softcap=2.0
    ),
    "first keys, one that is no sink": WindowProblem(24, 7, whole=True, num_sink_tokens=17, leading=True),
    "first keys, behind others": WindowProblem(30, 7, batch=2, num_sink_tokens=2, leading=True, weighing=True),
    "many sink tokens": WindowProblem(
        40, 9, batch=2, key_heads=1, padded=True, num_sink_tokens=17, sinks=True, softcap=2.0, weighing=True
    ),
    "weighed by other queries": WindowProblem(
        40, 9, batch=2, key_heads=1, padded=True, packed=True, num_sink_tokens=2, weighing=True
    ),
    "weighed by other queries, bidirectional": WindowProblem(20, 3, causal=False, key_heads=1, weighing=True),
    "sink tokens, large dimensions": WindowProblem(
        20,
        4,
        key_heads=1,
        repeats=1,
        dim=130,
        value_dim=70,
        whole=True,
        num_sink_tokens=2,
        leading=True,
        weighing=True,
    ),
    "many heads of a key": WindowProblem(20, 4, key_heads=1, repeats=5),
    "large dimensions": WindowProblem(20, 4, key_heads=1, repeats=1, dim=130, value_dim=70),
}
QUICK = ("everything", "bidirectional", "one token", "whole", "sink tokens", "first keys", "weighed by other queries")


@pytest.fixture
def kernels(monkeypatch):
    """Whatever can run on the kernels must."""
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")


def exact(problem: WindowProblem, dtype: torch.dtype, monkeypatch) -> dict[str, Tensor]:
    """In float64, from inputs rounded to `dtype`; what computes this is compared with the definition in test_window."""
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    return problem.results(torch.float64, change=lambda x: x.to(dtype).double())


def assert_same_bits(expected: dict[str, Tensor], actual: dict[str, Tensor]):
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick if case in QUICK else ()) for case in CASES]
)
def test_float32_equals_the_definition(case, monkeypatch):
    expected = exact(CASES[case], torch.float64, monkeypatch)
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")
    assert_close(expected, CASES[case].results(torch.float32), SINGLE)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("plain", torch.bfloat16),
        ("whole", torch.bfloat16),
        ("everything", torch.bfloat16),
        ("sink tokens, packed", torch.bfloat16),
        ("a first key", torch.bfloat16),
        ("many sink tokens", torch.bfloat16),
        ("first keys", torch.float16),
        ("bidirectional, everything", torch.float16),
    ],
)
def test_half_precision_is_as_exact_as_its_inputs(case, dtype, monkeypatch):
    """Against float64 from the same rounded inputs. In norm, rounding costs a fifth of the machine epsilon, and it happens to
    a result, to what the matrix units multiply and to the output behind the gradient: less than 1 epsilon in all. Gradients
    of parameters are sums over all tokens, which partly cancel: 4."""
    expected = exact(CASES[case], dtype, monkeypatch)
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")
    actual, eps = CASES[case].results(dtype), torch.finfo(dtype).eps
    errors = {name: ((actual[name] - x).norm() / x.norm()).item() / eps for name, x in expected.items()}
    parameters = ("grad memory_bias", "grad memory_query", "grad sinks")
    assert {name: x for name, x in errors.items() if not x <= (4 if name in parameters else 1)} == {}


def hopper_case(case: str, dtype: str) -> None:
    """See `tests/hopper.py`."""
    module.missing = lambda *device: None
    CASES[case].results(getattr(torch, dtype))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("sink tokens", "bfloat16"),
        ("many sink tokens", "float16"),
        ("first keys", "float32"),
        ("everything", "bfloat16"),
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_there(case, dtype, tmp_path):
    """The interpreter takes programs that the compiler refuses: a variable that changes its type in a loop, say."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.hopper", __name__, case, dtype]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["attend_kernel", "grad_queries_kernel", "grad_keys_kernel"]


SMALL = WindowProblem(20, 7, key_heads=1, padded=True, packed=True, sinks=True)
WHOLE = WindowProblem(20, 7, key_heads=1, whole=True)
WITH_SINK_TOKENS = WindowProblem(20, 7, key_heads=1, padded=True, num_sink_tokens=2, sinks=True, weighing=True)
FIRST_KEYS = WindowProblem(20, 7, key_heads=1, whole=True, num_sink_tokens=2, leading=True, weighing=True)
KEYS_APART = KeysApart(**asdict(FIRST_KEYS))


@pytest.mark.parametrize(
    "problem", [SMALL, WHOLE, WITH_SINK_TOKENS, FIRST_KEYS], ids=["small", "whole", "sink tokens", "first keys"]
)
def test_the_same_call_gives_the_same_bits_whatever_fresh_memory_holds(problem, kernels):
    """PyTorch fills fresh memory with NaN the second time, so that whatever is read before it is written shows."""
    expected = problem.results(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        actual = problem.results(torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(expected, actual)


def test_strides_do_not_matter(kernels):
    """Neither those of models, which keep the heads of a token side by side, nor those of a column cut off, nor any others."""

    def heads_side_by_side(x):
        x = torch.cat([x, x[..., :1]], dim=-1)
        return (x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x)[..., :-1]

    def transposed(x):
        return x.mT.contiguous().mT if x.ndim > 1 else x

    for problem in (SMALL, WITH_SINK_TOKENS):
        expected = problem.results(torch.float32)
        for change in (heads_side_by_side, transposed):
            assert_same_bits(expected, problem.results(torch.float32, change))


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_first_keys_that_stay_visible_are_sink_tokens_of_the_same_keys(backend, monkeypatch):
    """Output and gradients: those of a key that is both are the sum of what it gets as either."""
    monkeypatch.setenv("GMA_HF_BACKEND", backend)
    assert_close(FIRST_KEYS.results(torch.float32), KEYS_APART.results(torch.float32), SINGLE)


@pytest.mark.quick
def test_what_is_not_valid_is_never_seen(kernels):
    problem = replace(SMALL, packed=False)
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    expected = problem.run(tensors)
    is_hidden = ~problem.masks()["valid"][0]
    for name in ("key", "value"):
        tensors[name][:, :, is_hidden] = 1e20
    assert torch.equal(problem.run(tensors), expected)


@pytest.mark.quick
@pytest.mark.parametrize("causal", [True, False])
def test_tokens_that_do_not_exist_need_not_be_there(causal, monkeypatch):
    """A call over the tokens alone gives what one gives with invalid tokens before them and memories that hold nothing."""
    problem = WindowProblem(50, 9, causal=causal, key_heads=1, whole=True)
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    lead = problem.size if causal else 0
    longer = dict(tensors)
    for name in ("key", "value"):
        longer[name] = torch.nn.functional.pad(tensors[name], (0, 0, lead, 0), value=7.0)
    longer["read"] = torch.nn.functional.pad(tensors["read"], (0, 0, problem.unasked, 0), value=7.0)
    longer["log_weight"] = torch.nn.functional.pad(tensors["log_weight"], (problem.unasked, 0), value=-torch.inf)
    valid = torch.arange(50 + lead, device=DEVICE)[None] >= lead
    options = {"runs": None, "size": problem.size, "causal": causal, "scaling": 0.4}
    for backend in ("chunked", "triton"):
        monkeypatch.setenv("GMA_HF_BACKEND", backend)
        expected, actual = (
            window_softmax(**longer, valid=valid, **options),
            window_softmax(**tensors, valid=None, **options),
        )
        # Blocks of keys begin elsewhere, so that float32 sums have another order
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "problem",
    [SMALL, WindowProblem(20, 3, causal=False, key_heads=1), WHOLE, WITH_SINK_TOKENS, FIRST_KEYS],
    ids=["causal", "both", "whole", "sink tokens", "first keys"],
)
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_pytorch_finds_the_operators_well_formed(problem, backend, monkeypatch):
    """Schema, and shapes and strides without data."""
    monkeypatch.setenv("GMA_HF_BACKEND", backend)
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    names = (
        "query",
        "key",
        "value",
        "valid",
        "runs",
        "read",
        "log_weight",
        "memory_bias",
        "memory_query",
        "weighing_query",
    )
    inputs = [(tensors | problem.masks()).get(name) for name in names]
    seen = (tensors.get("sink_key"), tensors.get("sink_value"), None)
    if problem.leading:
        seen = (*(tensors[name][:, :, : problem.num_sink_tokens] for name in ("key", "value")), None)
    elif problem.num_sink_tokens > 0:
        seen = problem.sink_tokens(*seen[:2])[:3]
    sinks, options = tensors.get("sinks"), (problem.size, problem.causal, 0.4, problem.softcap)
    tests = ("test_schema", "test_faketensor")
    arguments = (*inputs, *seen, sinks, *options)
    torch.library.opcheck(torch.ops.gma_hf.window_softmax.default, arguments, test_utils=tests)
    output, log_sum = torch.ops.gma_hf.window_softmax(*arguments)
    arguments = (*inputs, *seen, output, log_sum, torch.randn_like(output), *options)
    torch.library.opcheck(torch.ops.gma_hf.window_softmax_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("problem", [SMALL, WITH_SINK_TOKENS, FIRST_KEYS], ids=["small", "sink tokens", "first keys"])
def test_compiles_into_one_graph_forward_and_backward(problem, kernels, monkeypatch):
    torch._dynamo.reset()
    expected = problem.results(torch.float32)
    compiled = torch.compile(window_softmax, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(window_problems, "window_softmax", compiled)
    assert_same_bits(expected, problem.results(torch.float32))


@pytest.mark.quick
def test_a_model_learns_the_same(monkeypatch):
    results = []
    for answer in (False, True):
        monkeypatch.setattr(module, "uses_kernels", lambda *tensors, answer=answer: answer)
        results.append(what_a_model_learns("windowed"))
    assert_close(*results, SINGLE)


def test_decoding_with_the_kernels_is_the_forward_pass(tokens, monkeypatch):
    monkeypatch.setattr(module, "uses_kernels", lambda *tensors: True)
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("windowed", num_hidden_layers=1)).to(DEVICE)
    tokens = tokens[:1, :9].to(DEVICE)
    with torch.no_grad():
        expected, cache, logits = model(tokens).logits, None, []
        for token in tokens.split([6, 1, 2], dim=1):
            outputs = model(token, **{CACHE_NAME: cache}, use_cache=True)
            cache = outputs[CACHE_NAME]
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=SINGLE)


UNABLE = {
    "float64": (SMALL, torch.float64, "no tensor may be float64"),
    "dimension": (WindowProblem(5, 2, dim=300), torch.float32, "dimension is above 256"),
}


@pytest.mark.quick
@pytest.mark.parametrize("unable", list(UNABLE))
def test_what_the_kernels_cannot_run_is_an_error_only_where_they_were_asked_for(unable, monkeypatch):
    problem, dtype, reason = UNABLE[unable]
    tensors = {name: x.to(dtype).to(DEVICE) for name, x in problem.tensors().items()}
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    problem.run(tensors)
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")
    with pytest.raises(ValueError, match=f"cannot run this window: .*{reason}.* Unset GMA_HF_BACKEND"):
        problem.run(tensors)


@pytest.mark.quick
def test_the_reason_for_plain_pytorch_on_a_gpu_is_logged_once(monkeypatch, caplog):
    """Which kernels a call takes is decided from dtypes, sizes and the device alone."""
    on_gpu = SimpleNamespace(dtype=torch.float64, shape=(1, 1, 3, 8), is_cuda=True)
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_EXPLAINED", set())
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            assert not module.uses_kernels(on_gpu, on_gpu, on_gpu, on_gpu)
    assert [record.message for record in caplog.records] == [
        "The triton backend cannot run this window: query and key must have the same dtype, and no tensor may be float64. "
        "Plain PyTorch runs it."
    ]


@pytest.mark.quick
def test_auto_never_chooses_the_interpreter(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the interpreter was chosen")

    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    monkeypatch.setattr(window_fused, "forward", refuse)
    masks = {name: x.cpu() for name, x in SMALL.masks().items()}
    tensors = {name: x.float() for name, x in SMALL.tensors().items()}
    window_softmax(**tensors, **masks, size=SMALL.size, causal=True, scaling=0.4)


@pytest.mark.quick
def test_queries_that_weigh_the_memory_fit_what_they_are_multiplied_with():
    tensors = {name: x.to(DEVICE) for name, x in WITH_SINK_TOKENS.tensors().items()}
    tensors["weighing_query"] = tensors["weighing_query"][..., :3]
    with pytest.raises(ValueError, match=r"2 heads of dimension 3, but `memory_query` has shape \[2, 12\]"):
        WITH_SINK_TOKENS.run(tensors)
