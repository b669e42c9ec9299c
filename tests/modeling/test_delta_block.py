# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The preset with the delta rule, and means that start orthogonal. The promises of all blocks are tested with it elsewhere."""

import pytest
import torch

from gma_hf import GMAConfig, GMAForCausalLM, gaussian_mixture_attention
from gma_hf.modeling.layout import Layout

from ..conftest import TINY, tiny_config


@pytest.mark.quick
def test_a_preset_with_the_delta_rule_is_causal_and_an_encoder_gets_the_correlated_block():
    config = GMAConfig.from_preset("delta", **TINY)
    assert config.use_delta_rule and config.correlate and config.use_decay and not config.use_write_weight
    encoder = GMAConfig.from_preset("delta", is_causal=False, **TINY)
    assert encoder.to_diff_dict() == GMAConfig.from_preset("correlated", is_causal=False, **TINY).to_diff_dict()


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong", [{"is_causal": False}, {"normalize_read": True, "correlate": False}, {"use_write_weight": True}]
)
def test_what_the_delta_rule_cannot_do_is_refused(wrong):
    values = {**GMAConfig.from_preset("delta", **TINY).to_dict(), "use_decay": False, "head_norm_eps": None}
    with pytest.raises(ValueError, match="`use_delta_rule=True` needs"):
        GMAConfig.from_dict({**values, **wrong})
    with pytest.raises(ValueError, match="`use_delta_rule=True` needs"):
        GMAConfig.from_preset("gated", **TINY, use_delta_rule=True, use_write_weight=False, window_size=4)
    with pytest.raises(ValueError, match="`mean_init` must be one of"):
        GMAConfig(**TINY, mean_init="orthonormal")


@pytest.mark.quick
def test_a_token_first_writes_a_twentieth_of_the_difference():
    torch.manual_seed(0)
    layer = GMAForCausalLM(tiny_config("delta")).model.layers[0].self_attn
    torch.testing.assert_close(layer.beta_bias.sigmoid(), torch.full((4,), 0.0474), rtol=0, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("components", [6, 8, 20])
def test_orthogonal_means_look_in_directions_of_their_own(components):
    """Of more components than dimensions, the dimensions are orthogonal. The means are as long as independent ones are."""
    torch.manual_seed(0)
    config = tiny_config("correlated", num_components=components, routing_dim=8, num_key_value_heads=4)
    means = GMAForCausalLM(config).model.layers[0].self_attn.mixture_norm.means.detach()
    products = means @ means.mT if components <= 8 else means.mT @ means
    length = config.mean_init_std**2 * max(components, 8)
    expected = length * torch.eye(min(components, 8)).expand_as(products)
    torch.testing.assert_close(products, expected, rtol=1e-4, atol=1e-4)
    typical = config.mean_init_std * 8**0.5
    assert means.norm(dim=-1).square().mean().sqrt().item() == pytest.approx(typical, rel=1e-4)


@pytest.mark.quick
def test_loaded_means_stay(tmp_path):
    torch.manual_seed(0)
    model = GMAForCausalLM(tiny_config("delta"))
    model.save_pretrained(tmp_path)
    again = GMAForCausalLM.from_pretrained(tmp_path)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.quick
def test_the_delta_rule_recalls_the_newest_value_of_a_key():
    """A memory that adds up reads a mixture of both values; a memory that corrects itself reads the newer one."""
    torch.manual_seed(0)
    mixture = torch.linalg.qr(torch.randn(16, 16))[0][None], torch.ones(1, 16, 16), torch.zeros(1, 16)
    key = 4 * torch.randn(1, 1, 12, 16)
    key[:, :, 8] = key[:, :, 2]
    value = torch.randn(1, 1, 12, 5)
    query = key[:, :, 2:3].expand_as(key)
    options = {"normalize": False, "correlate": True}

    def error(**more):
        read = gaussian_mixture_attention(query, key, value, *mixture, **options, **more)[:, :, 8]
        return (read - value[:, :, 8]).norm() / value[:, :, 8].norm()

    assert error(delta_strength=torch.ones(1, 1, 12)) < 1e-3 < 0.3 < error()


@pytest.mark.quick
def test_processes_that_share_a_sequence_are_refused():
    layer = GMAForCausalLM(tiny_config("delta")).model.layers[0].self_attn
    layout = Layout(1, 5)
    layout.row = object()
    states, strength = torch.randn(1, 4, 5, 8), torch.rand(1, 4, 5)
    with pytest.raises(ValueError, match=r"Processes cannot share a sequence.*Leave `context_parallel`"):
        layer.memory(
            layer.mixture_norm, None, states, states, states, layout=layout, normalize=False, delta_strength=strength
        )
