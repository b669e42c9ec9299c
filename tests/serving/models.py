# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny models of every kind that is served, with weights that make every part count."""

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from gma_hf import GMAConfig, GMAForCausalLM, convert_to_gma


VOCAB = 99
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]

# Preset and fields. vLLM's attention on a CPU wants heads of 64 and more
NATIVE = {
    "paper": ("paper", {}),
    "gated": ("gated", {}),
    "correlated": ("correlated", {}),
    "delta": ("delta", {}),
    "window and sinks": ("paper", {"position_embedding_type": "rope", "window_size": 8, "num_sink_tokens": 2}),
    "gated window": ("gated", {"window_size": 16, "num_sink_tokens": 3, "routing_dim": 24}),
    "hybrid": ("gated", {"layer_types": HYBRID, "head_dim": 64, "window_size": 8}),
}
EVERYTHING = {"window_size": 8, "num_sink_tokens": 2, "use_routing_projections": True, "use_forgetting": True}
# Class, fields, options of the conversion
CONVERTED = {
    "llama": ("LlamaForCausalLM", {}, {}),
    "llama with everything": ("LlamaForCausalLM", {}, EVERYTHING),
    "mistral": ("MistralForCausalLM", {"sliding_window": 6}, {"window_size": 8, "undo_rotation": False}),
    "qwen2": ("Qwen2ForCausalLM", {}, {"use_forgetting": True}),
    "qwen3 hybrid": ("Qwen3ForCausalLM", {"head_dim": 64}, {"window_size": 16, "num_sink_tokens": 1, "keep_every": 2}),
}


def make_model(kind: str, **other_fields) -> PreTrainedModel:
    """A model of one of the kinds above, perhaps with other fields of its configuration, in evaluation mode."""
    torch.manual_seed(0)
    if kind in NATIVE:
        preset, fields = NATIVE[kind]
        model = GMAForCausalLM(GMAConfig.from_preset(preset, num_components=6, **{**SIZES, **fields, **other_fields}))
    else:
        class_name, fields, options = CONVERTED[kind]
        model_class = getattr(transformers, class_name)
        model = convert_to_gma(
            model_class(model_class.config_class(**{**SIZES, **fields, **other_fields})), num_components=6, **options
        )
    for name, parameter in model.named_parameters():
        # What starts at zero says nothing about the code that reads it
        if "window_norm" in name or "routing.weight" in name or name.endswith("proj.bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()
