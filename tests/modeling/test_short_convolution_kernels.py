# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The short convolution is its definition, in plain PyTorch and in the fused kernels: on a GPU where there is one, else in
Triton's interpreter."""

import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gma_hf.modeling import GMAShortConvolution
from gma_hf.modeling.layout import Layout
from gma_hf.ops import dispatch
from tests.ops.kernels import DEVICE, what_a_model_learns
from tests.ops.problems import assert_close


pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from gma_hf.ops.convolution.functional import WAYS
from gma_hf.ops.convolution.triton import fused as short_convolution_fused


# float32 rounds at 6e-8, a result is a sum of a few products, and a gradient of a weight one over some hundred tokens
SINGLE = 3e-6


@dataclass
class ConvolutionProblem:
    """Random inputs of the module, and what it makes of them."""

    length: int
    width: int = 4
    channels: int = 5
    causal: bool = True
    batch: int = 1
    padded: bool = False
    packed: bool = False
    history: bool = False

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"hidden_states": (self.batch, self.length, self.channels), "weight": (self.channels, 1, self.width)}
        if self.history:
            shapes["history"] = (self.batch, self.width - 1, self.channels)
        return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}

    def masks(self) -> dict[str, Tensor]:
        """Which tokens are real, and runs of them."""
        place, masks = torch.arange(self.length), {}
        if self.padded:
            masks["padding_mask"] = (place % 5 != torch.arange(self.batch)[:, None] + 1) & (place % 23 < 17)
        if self.packed:
            masks["sequence_ids"] = (place // 7 + place // 40).expand(self.batch, -1)
        return {name: x.to(DEVICE) for name, x in masks.items()}

    def run(self, hidden_states: Tensor, weight: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor]:
        module = GMAShortConvolution(self.channels, self.width).to(DEVICE)
        # The very tensor, a leaf or not, so that its gradient is seen
        del module.weight
        module.weight = weight
        layout = Layout(*hidden_states.shape[:2], **self.masks())
        return module(hidden_states, self.causal, layout, history)

    def define(self, hidden_states: Tensor, weight: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y_t = SiLU(sum_j weight_j x_{t-j}), token by token, over the real ones of a sequence."""
        masks = self.masks()
        ids = masks.get("sequence_ids", torch.zeros(self.batch, self.length, dtype=torch.long, device=DEVICE))
        is_real = masks.get("padding_mask", torch.ones_like(ids)).bool()
        before = self.width - 1 if self.causal else self.width // 2
        if history is None:
            history = hidden_states.new_zeros(self.batch, self.width - 1, self.channels)
        rows = []
        for x, past, row_ids, row_real in zip(hidden_states, history, ids, is_real, strict=True):
            real = torch.nonzero(row_real)[:, 0].tolist()
            tokens = [*past, *(x[t] for t in real)]
            numbers = [row_ids[0].item()] * len(past) + [row_ids[t].item() for t in real]
            outputs = [torch.zeros_like(x[0])] * self.length
            for i, t in enumerate(real, start=len(past)):
                seen = [(i + j - before, weight[:, 0, j]) for j in range(self.width)]
                total = sum(tokens[s] * w for s, w in seen if s < len(tokens) and numbers[s] == numbers[i])
                outputs[t] = total * torch.sigmoid(total)
            rows.append(torch.stack(outputs))
        return torch.stack(rows)

    def results(self, dtype: torch.dtype, convolve=None, change=lambda x: x) -> dict[str, Tensor]:
        """The output, and the gradient of everything."""
        leaves = {name: change(x.to(dtype).to(DEVICE)).detach().requires_grad_() for name, x in self.tensors().items()}
        outputs = (convolve or (lambda **tensors: self.run(**tensors)[0]))(**leaves)
        assert outputs.dtype == dtype
        # In an order of its own, as what follows may ask for
        weights = torch.randn(outputs.mT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (outputs * weights.mT.to(outputs)).sum().backward()
        results = {"outputs": outputs.detach(), **{f"grad {name}": x.grad for name, x in leaves.items()}}
        return {name: x.cpu().to(torch.promote_types(dtype, torch.float32)) for name, x in results.items()}


CASES = {
    "causal": ConvolutionProblem(40, batch=2),
    "centred": ConvolutionProblem(20, causal=False, batch=2),
    "centred, even": ConvolutionProblem(20, width=5, causal=False),
    "many channels": ConvolutionProblem(9, width=3, channels=261),
    "channels of whole blocks": ConvolutionProblem(9, width=2, channels=256),
    "several segments": ConvolutionProblem(300, channels=3, packed=True, history=True),
    "several segments, centred": ConvolutionProblem(300, channels=3, causal=False, packed=True),
    "everything": ConvolutionProblem(45, batch=2, padded=True, packed=True, history=True),
    "everything, centred": ConvolutionProblem(45, width=5, causal=False, batch=2, padded=True, packed=True),
    "padded": ConvolutionProblem(45, batch=2, padded=True, history=True),
    "padded, centred": ConvolutionProblem(45, causal=False, batch=2, padded=True),
    "one token": ConvolutionProblem(1, batch=3, history=True),
    "one token, packed": ConvolutionProblem(1, packed=True),
    "fewer tokens than taps": ConvolutionProblem(3, width=8),
    "one token, centred": ConvolutionProblem(1, width=3, causal=False),
}
QUICK = ("causal", "everything, centred", "one token")
cases = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick if case in QUICK else ()) for case in CASES]
)


@pytest.fixture
def kernels(monkeypatch):
    """Whatever can run on the kernels must."""
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")


def exact(problem: ConvolutionProblem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """By the definition in float64, from inputs rounded to `dtype`."""
    return problem.results(torch.float64, problem.define, lambda x: x.to(dtype).double())


def always_take(name, monkeypatch):
    """Whatever suits, one way runs every convolution."""
    (way,) = (way for way in WAYS.ways if way.name == name)
    monkeypatch.setattr(WAYS, "choose", lambda *call: way)


def assert_same_bits(expected: dict[str, Tensor], actual: dict[str, Tensor]):
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@cases
def test_plain_pytorch_is_the_definition(case, monkeypatch):
    always_take("pytorch", monkeypatch)
    assert_close(exact(CASES[case]), CASES[case].results(torch.float64), 1e-13)


@cases
def test_the_kernels_are_the_definition(case, kernels):
    assert_close(exact(CASES[case]), CASES[case].results(torch.float32), SINGLE)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("causal", torch.bfloat16), ("everything", torch.bfloat16), ("everything, centred", torch.float16)],
)
def test_half_precision_is_as_exact_as_its_inputs(case, dtype, kernels):
    """Against float64 from the same rounded inputs. In norm, rounding costs a fifth of the machine epsilon, and it happens
    to a result, to the gradient of the output and to the gradient before SiLU."""
    expected, actual = exact(CASES[case], dtype), CASES[case].results(dtype)
    assert_close(expected, actual, 3 * torch.finfo(dtype).eps / 5)


SMALL = replace(CASES["everything"], length=12)


def test_the_same_call_gives_the_same_bits_whatever_fresh_memory_holds(kernels):
    """PyTorch fills fresh memory with NaN the second time, so that whatever is read before it is written shows."""
    expected = SMALL.results(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        actual = SMALL.results(torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(expected, actual)


@pytest.mark.quick
def test_strides_do_not_matter(kernels):
    """Neither those of a slice of a wider projection, nor those of channels that are not neighbours."""
    problem = replace(SMALL, padded=False, history=False)
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    hidden_states, masks = tensors["hidden_states"], problem.masks()

    def convolve(x):
        x = x.detach().requires_grad_()
        outputs = short_convolution_fused.short_convolution(x, tensors["weight"], masks["sequence_ids"], 3, 0)
        outputs.sum().backward()  # whose gradient has strides of zero
        return outputs, x.grad

    expected = convolve(hidden_states)
    for x in (torch.cat([hidden_states] * 3, dim=-1)[..., 5:10], hidden_states.mT.contiguous().mT):
        assert not x.is_contiguous()
        assert all(map(torch.equal, convolve(x), expected))


def test_history_continues_a_text(kernels):
    """Token by token, as in generation, gives what all tokens at once give."""
    problem = ConvolutionProblem(7)
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    expected, last = problem.run(**tensors)
    outputs, history = [], None
    for token in tensors["hidden_states"].split(1, dim=1):
        output, history = problem.run(token, tensors["weight"], history)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected)
    assert torch.equal(history, last)


@pytest.mark.parametrize("answer", [False, True], ids=["pytorch", "kernels"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
def test_autocast_keeps_the_dtype_of_projections(answer, packed, padded, monkeypatch):
    """bfloat16 from a projection stays bfloat16; the weight is float32, and so is its gradient."""
    always_take("triton" if answer else "pytorch", monkeypatch)
    problem = ConvolutionProblem(12, packed=packed, padded=padded)
    tensors = {name: x.float().to(DEVICE).requires_grad_() for name, x in problem.tensors().items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs, history = problem.run(tensors["hidden_states"].bfloat16(), tensors["weight"])
    outputs.float().sum().backward()
    assert outputs.dtype == history.dtype == torch.bfloat16
    assert {x.grad.dtype for x in tensors.values()} == {torch.float32}
    expected = problem.define(**{name: x.detach().double() for name, x in tensors.items()})
    # Rounded inputs, weights, sums and outputs, in norm a fifth of the machine epsilon each
    assert_close({"outputs": expected.cpu()}, {"outputs": outputs.detach().cpu()}, 4 * 2**-7 / 5)


def test_autocast_rounds_float32_as_conv1d_does(kernels):
    tensors = {name: x.float().to(DEVICE) for name, x in SMALL.tensors().items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        assert SMALL.run(**tensors)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("problem", [SMALL, CASES["centred"]], ids=["packed", "centred"])
def test_pytorch_finds_the_operators_well_formed(problem, kernels):
    """Schema, and shapes and strides without data."""
    tensors = {name: x.float().to(DEVICE) for name, x in problem.tensors().items()}
    inputs = (tensors["hidden_states"], tensors["weight"], problem.masks().get("sequence_ids"))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gma_hf.short_convolution.default, (*inputs, 2, 1), test_utils=tests)
    grad = torch.ones_like(inputs[0][:, 1:])
    torch.library.opcheck(torch.ops.gma_hf.short_convolution_backward.default, (*inputs, grad, 2, 1), test_utils=tests)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiles_into_one_graph_for_all_lengths(autocast, kernels):
    torch._dynamo.reset()
    module = GMAShortConvolution(5, 4).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)

    def outcome(module, hidden_states, history):
        module.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            outputs, history = module(hidden_states, history=history)
        outputs.float().sum().backward()
        return outputs, history, module.weight.grad

    for length in (9, 5):
        hidden_states = torch.randn(1, length, 5, device=DEVICE)
        history = torch.randn(1, 3, 5, device=DEVICE)
        expected = outcome(module, hidden_states, history)
        assert all(map(torch.equal, outcome(compiled, hidden_states, history), expected))


@pytest.mark.quick
def test_a_model_learns_the_same(monkeypatch):
    results = []
    for answer in (False, True):
        always_take("triton" if answer else "pytorch", monkeypatch)
        results.append(what_a_model_learns("gated"))
    # The rest of the model amplifies float32 rounding by some tens
    assert_close(*results, 2e-5)


UNABLE = {
    "float64": (ConvolutionProblem(5), torch.float64, "float64"),
    "width": (ConvolutionProblem(5, width=9), torch.float32, "wider than 8 tokens"),
}


@pytest.mark.quick
@pytest.mark.parametrize("unable", list(UNABLE))
def test_what_the_kernels_cannot_run_is_an_error_only_where_they_were_asked_for(unable, monkeypatch):
    problem, dtype, reason = UNABLE[unable]
    tensors = {name: x.to(dtype).to(DEVICE) for name, x in problem.tensors().items()}
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    problem.run(**tensors)
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")
    with pytest.raises(ValueError, match=f"cannot run this short convolution: .*{reason}.* Unset GMA_HF_BACKEND"):
        problem.run(**tensors)


@pytest.mark.quick
def test_the_reason_for_plain_pytorch_on_a_gpu_is_logged_once(monkeypatch, caplog):
    """Which way a call goes is decided from dtypes, sizes and the device alone."""
    on_gpu = SimpleNamespace(dtype=torch.float64, shape=(4, 1, 4), is_cuda=True)
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_EXPLAINED", set())
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            assert WAYS.choose(on_gpu, on_gpu).name == "pytorch"
    assert [record.message for record in caplog.records] == [
        "The triton backend cannot run this short convolution: the inputs or the weights are float64. Plain PyTorch runs it."
    ]


@pytest.mark.quick
def test_auto_never_chooses_the_interpreter(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the interpreter was chosen")

    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    monkeypatch.setattr(short_convolution_fused, "short_convolution", refuse)
    GMAShortConvolution(5, 4)(torch.randn(1, 6, 5))
