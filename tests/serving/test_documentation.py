# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The table of docs/serving.md is what the code calculates, and its words name what the code does."""

from pathlib import Path

import pytest
import torch

from gma_hf import GMAConfig
from gma_hf.conversion.checkpoints.classes import converted_config_class
from gma_hf.serving.layouts import stream_bytes
from gma_hf.serving.plugin import MODELS


PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
GATED = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "head_dim": 128}


def gated(**fields):
    return GMAConfig.from_preset("gated", **GATED, **fields)


def converted_llama():
    from transformers import LlamaConfig

    heads = {"num_heads": 32, "num_key_value_heads": 8, "routing_dim": 128, "value_dim": 128}
    layer = {**heads, "is_causal": True, "rotary_dim": 128}
    options = {
        "num_components": 64,
        "window_size": 64,
        "num_sink_tokens": 4,
        "mean_init_std": 1.0,
        "variance_init": 1.0,
    }
    rest = {"use_routing_projections": False, "use_forgetting": False, "variance_floor": 1e-4, "read_eps": 1e-6}
    layers = {f"layers.{idx}.self_attn": layer for idx in range(32)}
    return converted_config_class(LlamaConfig)(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        gma={"layers": layers, "softmax_layers": [], **options, **rest},
    )


def softmax_bytes(config, num_tokens: int) -> int:
    """Keys and values of all layers, in 16 bits."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2 * num_tokens


MODELS_OF_THE_TABLE = {
    "gated": gated(),
    "hybrid": gated(layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 6),
    "llama": converted_llama(),
}


@pytest.mark.parametrize("row, kind", list(enumerate(MODELS_OF_THE_TABLE)))
@pytest.mark.parametrize("column, num_tokens", list(enumerate([1024, 8192, 131072])))
def test_the_table_of_sizes_is_what_the_code_calculates(row, kind, column, num_tokens):
    config = MODELS_OF_THE_TABLE[kind]
    ours, softmax = stream_bytes(config, torch.bfloat16, num_tokens), softmax_bytes(config, num_tokens)
    streams = [f"{gib * 2**30 // ours:,} / {gib * 2**30 // softmax:,}" for gib in (4, 16, 80)]
    lines = [line for line in PAGE.splitlines() if " MiB |" in line]
    cells = [cell.strip() for cell in lines[3 * row + column].split("|")]
    assert cells[2:] == [f"{num_tokens:,}", f"{ours / 2**20:,.1f} / {softmax / 2**20:,.0f} MiB", *streams, ""]


def test_the_page_names_every_architecture_that_is_served():
    for architecture in MODELS:
        name = architecture if architecture == "GMAForCausalLM" else architecture.removeprefix("GMA")
        assert f"`{name}`" in PAGE
