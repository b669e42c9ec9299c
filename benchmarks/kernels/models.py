# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The models whose speed is measured on a GPU: GMA, and the same model with softmax attention."""

import torch

from gma_hf import GMAConfig, GMAForCausalLM


SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_components": 64}
SOFTMAX = "softmax + RoPE"
MODELS = {
    "GMA gated": ("gated", "linear_attention"),
    "GMA correlated": ("correlated", "linear_attention"),
    "GMA paper": ("paper", "linear_attention"),
    SOFTMAX: ("gated", "full_attention"),
}
# The masks of both types of layer: no token is padding; said outright, it spares the search for packed sequences
NO_MASK = {"full_attention": None, "linear_attention": None}


def make_model(name: str, sizes: dict, device: str | torch.device = "cuda") -> GMAForCausalLM:
    """The model with random float32 weights; a name may say more behind a comma."""
    preset, layer_type = MODELS[name.split(",")[0]]
    config = GMAConfig.from_preset(preset, **sizes, layer_types=[layer_type] * sizes["num_hidden_layers"])
    torch.manual_seed(0)
    with torch.device(device):
        return GMAForCausalLM(config)
