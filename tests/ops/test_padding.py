# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Padding writes nothing, whatever it holds, and has no gradient: one rule for every way of every operator."""

import pytest
import torch

from gma_hf import GMAConfig, GMAForCausalLM, GMAForMaskedLM
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.ops.triton_support import INSTALLED
from tests.conftest import make_model, tiny_config

from .kernels import DEVICE
from .problems import Problem


FEATURES = {
    "normalised": {},
    "gated": {"normalize": False, "decay": True},
    "correlated": {"correlate": True, "decay": True},
    "grouped": {"key_heads": 2, "mixtures_per_key_head": 2, "state": True},
    "bidirectional": {"causal": False},
    "packed bidirectional": {"causal": False, "packed": True},
}
PADDING = slice(5, 11)


def padded(problem: Problem) -> dict[str, torch.Tensor]:
    tensors = problem.tensors()
    tensors["write_weight"] = tensors["write_weight"] + 0.5
    tensors["write_weight"][0, :, PADDING] = 0.0
    return tensors


def of_real_tokens(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The results without what padding itself reads."""
    is_real = torch.ones(results["output"].shape[:1] + results["output"].shape[2:3], dtype=torch.bool)
    is_real[0, PADDING] = False
    return results | {"output": results["output"].transpose(1, 2)[is_real]}


@pytest.mark.parametrize("name", ["value", "key", "query"])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("backend", ["reference", "chunked", "recurrent"])
def test_junk_at_padding_changes_no_bit(backend, features, junk, name):
    problem = Problem(weights=True, **FEATURES[features])
    if backend == "recurrent" and not problem.causal:
        backend = "auto"
    tensors = padded(problem)
    tensors[name][0, :, PADDING] = 0.0
    expected = problem.run(tensors, backend=backend)
    tensors[name][0, :, PADDING] = junk
    actual = problem.run(tensors, backend=backend)
    if name == "query":
        # What padding reads is its own; nobody else sees it
        expected, actual = of_real_tokens(expected), of_real_tokens(actual)
    for result in expected:
        assert torch.equal(expected[result], actual[result]), result


@pytest.mark.skipif(not INSTALLED or DEVICE != "cpu", reason="needs Triton's interpreter")
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("features", ["normalised", "gated", "bidirectional"])
def test_junk_at_padding_changes_no_bit_in_the_kernels(features, length):
    """Nor any gradient but that of the padding's own weight, which is a constant 0 in every model."""
    problem = Problem(weights=True, length=length, **FEATURES[features])

    def results(junk: float) -> dict[str, torch.Tensor]:
        tensors = {name: x.float() for name, x in padded(problem).items()}
        if length == 1:
            tensors["write_weight"][0] = 0.0
        at = slice(0, 1) if length == 1 else PADDING
        for name in ("query", "key", "value"):
            tensors[name][0, :, at] = junk
        leaves = {name: x.requires_grad_(length > 1) for name, x in tensors.items()}
        outputs = problem.run(leaves, backend="triton")
        if length == 1:
            return {name: x[1:] if name == "output" else x for name, x in outputs.items()}
        outputs = of_real_tokens(outputs)
        grads = torch.autograd.grad(
            outputs["output"].sin().sum(), leaves.values(), materialize_grads=True, allow_unused=True
        )
        named = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        named["grad write_weight"][0, :, PADDING] = 0.0
        return outputs | named

    expected = results(0.0)
    for junk in (torch.nan, torch.inf):
        for name, result in results(junk).items():
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("backend", ["reference", "chunked", "recurrent"])
def test_junk_at_padding_spoils_no_gradient(backend, features):
    problem = Problem(weights=True, **FEATURES[features])
    if backend == "recurrent" and not problem.causal:
        backend = "auto"

    def gradients(junk: float) -> dict[str, torch.Tensor]:
        tensors = padded(problem)
        for name in ("key", "value"):
            tensors[name][0, :, PADDING] = junk
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        output = problem.run(leaves, backend=backend)["output"]
        is_real = torch.ones(output.shape[2], dtype=torch.bool)
        is_real[PADDING] = False
        loss = output[:, :, is_real].sin().sum()  # nobody looks at what padding reads
        return dict(
            zip(
                leaves,
                torch.autograd.grad(loss, leaves.values(), materialize_grads=True, allow_unused=True),
                strict=True,
            )
        )

    expected, actual = gradients(0.0), gradients(torch.inf)
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=0, msg=name)
    for name in ("query", "key", "value"):
        assert not actual[name][0, :, PADDING].any(), name


BLOCKS = {
    "paper": {},
    "gated": {},
    "gated window": {"window_size": 4},
    "gated hybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("block", BLOCKS)
def test_what_a_model_reads_at_padding_has_no_gradient(block, direction, side):
    values = dict(BLOCKS[block])
    if direction == "bidirectional":
        values |= {"is_causal": False, "use_decay": False}
    config: GMAConfig = tiny_config(block.split()[0], **values)
    model = make_model(GMAForCausalLM if config.is_causal else GMAForMaskedLM, config)
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    at = slice(0, 5) if side == "left" else slice(7, 12)
    mask[0, at] = 0
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    labels = tokens.masked_fill(mask == 0, -100)
    if config.is_causal and side == "left":
        labels[0, 5] = -100  # the first real token would be predicted from padding
    model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
    # Real tokens have one: all that something is predicted from
    read = mask.bool()
    if config.is_causal:
        read[:, -1] = False
        read[0, 6] &= side == "left"
    assert (embeds.grad[read].abs().amax(dim=-1) > 0).all()
    assert not embeds.grad[0, at].any()


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("block", [block for block in BLOCKS if block != "gated hybrid"])
def test_junk_at_padding_reaches_no_real_token_of_a_model(block, backend, monkeypatch):
    """
    NaN and inf in the embeddings of padding, through attention, window and convolution, in PyTorch and in the kernels. Softmax
    layers of hybrids multiply them by 0, as those of every model of Transformers, and get NaN.
    """
    if backend == "triton":
        if not INSTALLED or DEVICE != "cpu":
            pytest.skip("needs Triton's interpreter")
        monkeypatch.setenv("GMA_HF_BACKEND", "triton")
    model = make_model(GMAForCausalLM, tiny_config(block.split()[0], **{"num_hidden_layers": 2, **BLOCKS[block]}))
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    embeds = model.get_input_embeddings()(tokens).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=mask)
        for junk in (torch.nan, torch.inf, -torch.inf):
            spoilt = embeds.masked_fill(mask[..., None] == 0, junk)
            actual = model(inputs_embeds=spoilt, attention_mask=mask)
            assert torch.equal(actual.logits[mask == 1], expected.logits[mask == 1])
            step = model(tokens[:, :1], **{CACHE_NAME: actual[CACHE_NAME]}).logits
            assert step.isfinite().all()
