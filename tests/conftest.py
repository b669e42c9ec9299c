# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Small models that every test module may use, and the settings of the property-based tests."""

import os


# Nothing in the tests reaches for a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings


# Where there is no GPU, the fused kernels run in Triton's interpreter: Triton looks when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gma_hf


settings.register_profile("gma_hf", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("gma_hf")
torch.set_num_threads(1)

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_components": 6,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRID_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
# The blocks that a user may choose between: every promise of the models holds for each of them
BLOCKS = {
    "paper": {"preset": "paper"},
    "paper-rope": {"preset": "paper", "position_embedding_type": "rope", "num_key_value_heads": 2, "routing_dim": 12},
    "gated": {"preset": "gated"},
    "gated-gqa": {"preset": "gated", "num_key_value_heads": 2, "routing_dim": 6, "normalize_read": True},
    "correlated": {"preset": "correlated", "num_key_value_heads": 2, "routing_dim": 12},
    "delta": {"preset": "delta", "num_key_value_heads": 2},
    "windowed": {"preset": "gated", "num_key_value_heads": 2, "window_size": 5, "num_sink_tokens": 2},
    "hybrid": {"preset": "gated", "layer_types": HYBRID_LAYERS},
}


def tiny_config(block: str = "gated", **overrides) -> gma_hf.GMAConfig:
    values = {**TINY, **BLOCKS[block], **overrides}
    if not values.get("is_causal", True):
        values.pop("num_sink_tokens", None)  # which look back
    return gma_hf.GMAConfig.from_preset(**values)


def make_model(model_class, config, seed: int = 0):
    """A model in evaluation mode whose every parameter has been moved away from where its initialisation put it."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(params=list(BLOCKS))
def block(request):
    return request.param


@pytest.fixture
def tokens():
    """Two rows of 19 tokens, none of them special."""
    return torch.randint(3, TINY["vocab_size"], (2, 19), generator=torch.Generator().manual_seed(1))
