# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Casts of a model round its weights, and nothing else; float16 does not overflow where a norm follows."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import gma_hf
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import make_converted_model


@pytest.mark.quick
@pytest.mark.parametrize("block", ["paper-rope", "hybrid", "converted"])
def test_a_cast_does_not_round_the_frequencies_of_positions(block, tmp_path):
    overrides = {"position_embedding_type": "rope", "max_position_embeddings": 8192}
    if block == "converted":
        model = make_converted_model("llama", overrides={"max_position_embeddings": 8192}, layers=[0], window_size=4)
    else:
        model = make_model(gma_hf.GMAForCausalLM, tiny_config(block, **overrides))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = torch.randint(3, 99, (1, 32), generator=torch.Generator().manual_seed(1))
    places = torch.arange(4000, 4032)[None]
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.type(torch.bfloat16)):
        other = cast(copy.deepcopy(model))
        assert all(x.dtype == torch.float32 for x in other.buffers() if x.is_floating_point())
        with torch.no_grad():
            logits = other(tokens, position_ids=places, use_cache=False).logits
            assert torch.equal(logits, loaded(tokens, position_ids=places, use_cache=False).logits)


@pytest.mark.quick
@pytest.mark.parametrize("use_cache", [False, True])
def test_an_unnormalised_read_does_not_overflow_in_float16(use_cache):
    """A sum over 8,192 equal tokens is far above 65,504; the norm per head brings it back."""
    config = tiny_config(
        "paper", num_hidden_layers=1, num_components=1, normalize_read=False, position_embedding_type="none"
    )
    model = make_model(gma_hf.GMAForCausalLM, config)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(40)
        tokens = torch.full((1, 8192), 5)
        expected = model(tokens, use_cache=use_cache).logits
        logits = copy.deepcopy(model).half()(tokens, use_cache=use_cache).logits
    assert logits.isfinite().all()
    # Sums of rounded weights: some units of 2^-11 of the largest logit
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
