# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of nothing but padding, huge activations, degenerate variances, long rows: nothing becomes NaN."""

import pytest
import torch

import gma_hf
from tests.conftest import TINY, make_model, tiny_config
from tests.conversion.tiny_models import make_converted_model


@pytest.fixture(params=[True, False], ids=["causal", "bidirectional"])
def is_causal(request):
    return request.param


def language_model(block, is_causal, **overrides):
    model_class = gma_hf.GMAForCausalLM if is_causal else gma_hf.GMAForMaskedLM
    return make_model(model_class, tiny_config(block, is_causal=is_causal, **overrides))


def assert_gradients_are_finite(model):
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []


@pytest.mark.quick
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_padding_touches_no_other_row(block, is_causal, implementation, tokens):
    model = language_model(block, is_causal)
    model.set_attn_implementation(implementation)
    expected = model(tokens[1:], labels=tokens[1:])
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    mask = torch.tensor([[0], [1]]).expand_as(tokens)
    outputs = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    assert outputs.logits.isfinite().all()
    # Float32 sums in another order
    torch.testing.assert_close(outputs.logits[1:], expected.logits, rtol=1e-4, atol=2e-5)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.quick
def test_a_row_of_padding_is_classified_as_something(block, is_causal, tokens):
    model = make_model(gma_hf.GMAForSequenceClassification, tiny_config(block, is_causal=is_causal, pad_token_id=None))
    mask = torch.tensor([[0], [1]]).expand_as(tokens)
    outputs = model(tokens, attention_mask=mask, labels=torch.tensor([0, 1]))
    outputs.loss.backward()
    assert outputs.logits.isfinite().all() and outputs.loss.isfinite()
    assert_gradients_are_finite(model)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "raw_variance"), [(1e3, None), (1.0, -20.0), (1e3, -20.0), (1.0, 50.0)])
def test_extreme_states_and_variances_stay_finite(scale, raw_variance, dtype, block, is_causal, tokens):
    model = language_model(block, is_causal, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "q_proj" in name or "k_proj" in name:
                parameter.mul_(scale)
            if "raw_variances" in name and raw_variance is not None:
                parameter.fill_(raw_variance)
    outputs = model.to(dtype)(tokens, labels=tokens)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all() and outputs.loss.isfinite()
    assert_gradients_are_finite(model)


def test_five_thousand_tokens_forward_and_backward(block, is_causal):
    model = language_model(block, is_causal, num_hidden_layers=1, layer_types=None, max_position_embeddings=5001)
    tokens = torch.randint(3, TINY["vocab_size"], (1, 5001), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert_gradients_are_finite(model)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["native", "converted"])
@torch.no_grad()
def test_no_row_and_no_token_are_refused_by_name(kind):
    model = language_model("gated", True) if kind == "native" else make_converted_model("llama")
    tokens = torch.randint(3, 99, (2, 7))
    for empty in (tokens[:0], tokens[:, :0]):
        with pytest.raises(ValueError, match=r"The tokens have shape \(\d, \d\).*none of them 0"):
            model(empty)
        with pytest.raises(ValueError, match=r"The tokens have shape \(\d, \d, 32\).*none of them 0"):
            model(inputs_embeds=model.get_input_embeddings()(empty))
