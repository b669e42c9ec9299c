# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Ranks that hold a part of the heads each: what they give adds up to what one process gives."""

import pytest
import torch

from gma_hf.conversion.runtime.layer import GMAConversion
from gma_hf.modeling.modeling_gma import GMADecoderLayer
from gma_hf.serving.layouts import model_layout, rank_config
from gma_hf.serving.sharding import shard_weights
from tests.serving.models import CONVERTED, NATIVE, make_model


RANKS = 2
LENGTH = 40


def load(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """As vLLM loads: every parameter knows which part of the checkpoint's it is."""
    for name, parameter in module.named_parameters():
        parameter.weight_loader(parameter, weights[name])


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in NATIVE if kind != "window and sinks"])
def test_attention_and_mlp_of_all_ranks_add_up(kind, bias):
    model = make_model(kind, attention_bias=bias, mlp_bias=bias)
    config, block = model.config, model.model.layers[0]
    hidden_states = torch.randn(1, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(1))
    attention, mlp = 0, 0
    for rank in range(RANKS):
        part = GMADecoderLayer(rank_config(config, RANKS), 0).eval()
        layers = torch.nn.ModuleList([part])
        shard_weights(layers, rank, RANKS)
        load(layers, {f"0.{name}": weight for name, weight in block.state_dict().items()})
        attention = attention + part.self_attn(hidden_states)[0]
        mlp = mlp + part.mlp(hidden_states)
    torch.testing.assert_close(attention, block.self_attn(hidden_states)[0], atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(mlp, block.mlp(hidden_states), atol=2e-5, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama with everything", "qwen2"])
def test_heads_of_a_converted_layer_lie_side_by_side(kind):
    whole = make_model(kind).model.layers[0].self_attn.gma
    whole.rotary_dim = 0  # rotations know no heads
    generator = torch.Generator().manual_seed(1)
    heads = (whole.num_heads, whole.num_key_value_heads, whole.num_key_value_heads)
    inputs = [torch.randn(1, n, LENGTH, whole.routing_dim, generator=generator) for n in heads]
    options = {
        "variance_floor": 1e-4,
        "read_eps": 1e-6,
        "mean_init_std": 1.0,
        "variance_init": 1.0,
        "num_components": 6,
    }
    outputs = []
    for rank in range(RANKS):
        part = GMAConversion(
            whole.num_heads // RANKS,
            whole.num_key_value_heads // RANKS,
            whole.routing_dim,
            whole.value_dim,
            True,
            window_size=0 if whole.window_norm is None else whole.window_norm.window_size,
            num_sink_tokens=0 if whole.window_norm is None else whole.window_norm.num_sink_tokens,
            use_routing_projections=whole.q_routing is not None,
            use_forgetting=whole.forgetting is not None,
            **options,
        ).eval()
        shard_weights(part, rank, RANKS)
        load(part, whole.state_dict())
        outputs.append(part(*(x.chunk(RANKS, dim=1)[rank] for x in inputs))[0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole(*inputs)[0], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("kind", [*NATIVE, *CONVERTED])
def test_ranks_share_the_bytes_of_a_stream(kind):
    config = make_model(kind).config
    whole, part = (model_layout(config, torch.float32, ranks) for ranks in (1, RANKS))
    per_head = ("state", "normalizer", "keys", "values", "routing_keys", "conv", "sink_keys")
    sizes = [{field.name: field.num_bytes for field in layout.fields()} for layout in (whole, part)]
    for name in per_head:
        assert sizes[1].get(name, 0) * RANKS == sizes[0].get(name, 0)


def test_a_tensor_of_another_shape_is_refused():
    model = make_model("paper")
    layers = model.model.layers
    shard_weights(layers, 0, 1)
    parameter = layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match="the weights belong together"):
        parameter.weight_loader(parameter, parameter[:-1].clone())
