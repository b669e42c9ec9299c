# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The fused kernels compute the window: on a GPU where there is one, else in Triton's interpreter."""

import logging
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import gma_hf
from gma_hf.modeling import kernel_choice
from gma_hf.modeling import window_softmax as module
from gma_hf.modeling.sink_tokens import SinkTokens
from gma_hf.modeling.window_softmax import window_softmax
from tests.conftest import make_model, tiny_config
from tests.ops.kernels import DEVICE, what_a_model_learns
from tests.ops.problems import assert_close


pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from gma_hf.modeling import window_fused


# float32 rounds at 6e-8; sums over some tens of tokens and dimensions amplify it by some tens
SINGLE = 2e-5


@dataclass
class WindowProblem:
    """Random inputs of `window_softmax`, and what it makes of them."""

    length: int
    size: int
    causal: bool = True
    batch: int = 1
    key_heads: int = 2
    repeats: int = 2
    dim: int = 12
    value_dim: int = 20
    padded: bool = False
    packed: bool = False
    sinks: bool = False
    num_sink_tokens: int = 0
    softcap: float | None = None
    whole: bool = (
        False  # no token before the first, none that does not exist, and a memory that only later queries have
    )

    @property
    def lead(self) -> int:
        """How many keys stand before that of the first query."""
        return self.size if self.causal and not self.whole else 0

    @property
    def unasked(self) -> int:
        """How many queries have no memory."""
        return min(self.size, self.length - 1) if self.whole else 0

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        heads, keys, asked = self.key_heads * self.repeats, self.length + self.lead, self.length - self.unasked

        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        log_weight = math.log(3) + draw(self.batch, heads, asked)
        tensors = {
            "query": 2 * draw(self.batch, heads, self.length, self.dim),
            "key": draw(self.batch, self.key_heads, keys, self.dim),
            "value": draw(self.batch, self.key_heads, keys, self.value_dim),
            "read": draw(self.batch, heads, asked, self.value_dim),
            "log_weight": log_weight,
            "memory_bias": draw(heads),
            "memory_query": 0.3 * draw(heads, self.dim),
        }
        # What nothing was written to, and what was forgotten
        untold = min(self.size, asked // 2)
        tensors["log_weight"][:, :, :untold] = -torch.inf
        tensors["log_weight"][:, :, 1:untold:2] = -44.0
        if self.sinks:
            tensors["sinks"] = draw(heads)
        if self.num_sink_tokens > 0:
            num_sinks = 3 * self.num_sink_tokens if self.packed else self.num_sink_tokens
            tensors["sink_key"] = draw(self.batch, self.key_heads, num_sinks, self.dim)
            tensors["sink_value"] = draw(self.batch, self.key_heads, num_sinks, self.value_dim)
        return tensors

    def sink_tokens(self, key: Tensor, value: Tensor) -> SinkTokens:
        """What the queries behind the first five see; packed, of three sequences."""
        place, rank = torch.arange(5, self.length), torch.arange(self.num_sink_tokens)
        index = (place * 3 // self.length)[:, None] * self.num_sink_tokens + rank
        index = index.expand(self.batch, -1, -1).to(DEVICE) if self.packed else None
        visible = (rank < place[:, None] - 5)[None].to(DEVICE)
        return SinkTokens(key, value, visible, index)

    def masks(self) -> dict[str, Tensor | None]:
        """Which tokens there are, and runs of them."""
        place = torch.arange(self.length + self.lead)
        valid = (place >= self.lead)[None]
        if self.padded:
            rows = torch.arange(self.batch)[:, None]
            valid = valid & (place % 5 != rows) & (place % 23 < 17)
        runs = (place // 9 + place // 40).expand(self.batch, -1) if self.packed else None
        masks = {"valid": None if self.whole else valid, "runs": runs}
        return {name: None if x is None else x.to(DEVICE) for name, x in masks.items()}

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        tensors = dict(tensors)
        if self.num_sink_tokens > 0:
            tensors["sink_tokens"] = self.sink_tokens(tensors.pop("sink_key"), tensors.pop("sink_value"))
        return window_softmax(
            **tensors, **self.masks(), size=self.size, causal=self.causal, scaling=0.4, softcap=self.softcap
        )

    def results(self, dtype: torch.dtype, change=lambda x: x) -> dict[str, Tensor]:
        """The output, and the gradient of everything."""
        leaves = {name: change(x.to(dtype).to(DEVICE)).detach().requires_grad_() for name, x in self.tensors().items()}
        output = self.run(leaves)
        # In an order of its own, as what follows an attention may ask for
        weights = torch.randn(output.mT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (output * weights.mT.to(output)).sum().backward()
        results = {"output": output.detach(), **{f"grad {name}": x.grad for name, x in leaves.items()}}
        return {name: x.cpu().to(torch.promote_types(dtype, torch.float32)) for name, x in results.items()}


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
    "many heads of a key": WindowProblem(20, 4, key_heads=1, repeats=5),
    "large dimensions": WindowProblem(20, 4, key_heads=1, repeats=1, dim=130, value_dim=70),
}
QUICK = ("everything", "bidirectional", "one token", "whole", "sink tokens")


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


SMALL = WindowProblem(20, 7, key_heads=1, padded=True, packed=True, sinks=True)
WHOLE = WindowProblem(20, 7, key_heads=1, whole=True)


@pytest.mark.parametrize("problem", [SMALL, WHOLE], ids=["small", "whole"])
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

    expected = SMALL.results(torch.float32)
    for change in (heads_side_by_side, transposed):
        assert_same_bits(expected, SMALL.results(torch.float32, change))


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
    "problem", [SMALL, WindowProblem(20, 3, causal=False, key_heads=1), WHOLE], ids=["causal", "both", "whole"]
)
def test_pytorch_finds_the_operators_well_formed(problem, kernels):
    """Schema, and shapes and strides without data."""
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    masks, sinks = problem.masks(), tensors.pop("sinks", None)
    query, key, value, *rest = tensors.values()
    inputs = (query, key, value, masks["valid"], masks["runs"], *rest)
    options = (problem.size, problem.causal, 0.4, problem.softcap)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gma_hf.window_softmax.default, (*inputs, sinks, *options), test_utils=tests)
    output, log_sum = torch.ops.gma_hf.window_softmax(*inputs, sinks, *options)
    arguments = (*inputs, output, log_sum, torch.randn_like(output), *options)
    torch.library.opcheck(torch.ops.gma_hf.window_softmax_backward.default, arguments, test_utils=tests)


def test_compiles_into_one_graph_forward_and_backward(kernels, monkeypatch):
    torch._dynamo.reset()
    expected = SMALL.results(torch.float32)
    compiled = torch.compile(window_softmax, fullgraph=True, backend="aot_eager")
    monkeypatch.setitem(globals(), "window_softmax", compiled)
    assert_same_bits(expected, SMALL.results(torch.float32))


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
            outputs = model(token, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
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
    monkeypatch.setattr(kernel_choice, "_EXPLAINED", set())
    with caplog.at_level(logging.INFO, logger=kernel_choice.__name__):
        for _ in range(2):
            assert not module.uses_kernels(on_gpu, on_gpu, on_gpu, on_gpu)
    assert [record.message for record in caplog.records] == [
        "The fused kernels cannot run this window: query and key must have the same dtype, and no tensor may be float64. "
        "Plain PyTorch does."
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
