# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The block whose routes correlate: what its equations and its beginning promise."""

import math

import pytest
import torch

import gma_hf
from gma_hf.modeling.attention_gma import GMAAttention
from tests.conftest import make_model, tiny_config


def attention_layers(model):
    return [module for module in model.modules() if isinstance(module, GMAAttention)]


@pytest.mark.quick
def test_the_affinity_of_two_tokens_is_the_correlation_of_their_routes():
    """Without forgetting and with equal write weights, entry (t, j) is Pearson's r of the two tokens' responsibilities."""
    config = tiny_config(
        "correlated", num_hidden_layers=1, use_decay=False, use_write_weight=False, num_key_value_heads=4
    )
    model = make_model(gma_hf.GMAModel, config).double()
    tokens = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
    routed = {}
    mixture = attention_layers(model)[0].mixture_norm
    mixture.register_forward_pre_hook(lambda module, args: routed.update(query=args[0], key=args[1]))
    affinity = model(tokens, output_attentions=True, use_cache=False).attentions[0]
    deviations = [mixture.responsibilities(routed[name]) - 1 / config.num_components for name in ("query", "key")]
    # Pearson's r but for the 1e-8 of the definition, which counts where a route hardly differs from the average
    spread = 1e-8 / config.num_components
    query, key = (x / (x.square().sum(dim=-1, keepdim=True) + spread).sqrt() for x in deviations)
    expected = (query @ key.transpose(-1, -2)).tril()
    torch.testing.assert_close(affinity.double(), expected, rtol=0, atol=1e-6)
    assert affinity.min() < -0.1, "an affinity that is never negative is no correlation"


@pytest.mark.quick
def test_a_token_begins_with_one_route_as_query_and_as_key():
    torch.manual_seed(0)
    model = gma_hf.GMAModel(tiny_config("correlated"))
    for layer in attention_layers(model):
        query, key = (
            x.weight.unflatten(0, (-1, 12)) for x in (layer.q_proj, layer.k_proj)
        )  # heads of 12 routing dimensions
        assert torch.equal(query[0], key[0]) and torch.equal(query[1], key[0]) and torch.equal(query[3], key[1])
        assert layer.q_proj.weight.data_ptr() != layer.k_proj.weight.data_ptr()


@pytest.mark.quick
def test_the_attention_begins_quiet_and_its_norm_has_an_epsilon_of_its_own():
    torch.manual_seed(0)
    config = tiny_config("correlated", hidden_size=128, num_attention_heads=4, initializer_range=0.02)
    for layer in attention_layers(gma_hf.GMAModel(config)):
        expected = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        # The standard deviation of 16,384 draws is known to 0.6 %
        assert layer.o_proj.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert layer.o_norm.variance_epsilon == 1e-4
        assert layer.q_norm.variance_epsilon == config.rms_norm_eps


def test_a_saved_model_loads_with_what_it_learned_and_not_with_how_it_began(tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("correlated"))
    model.save_pretrained(tmp_path)
    loaded = gma_hf.GMAForCausalLM.from_pretrained(tmp_path)
    for (name, parameter), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(parameter, other), name
