# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models of every architecture that is promised to convert."""

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from gma_hf import convert_to_gma, gma_layers


VOCAB = 99
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 2}
ENCODER = {**SIZES, "hidden_dropout_prob": 0.0}
# Shorter than the test sequences, so that sliding-window layers do slide
WINDOW = 6
IMAGE = {**{k: v for k, v in SIZES.items() if "token" not in k}, "image_size": 8, "patch_size": 2, "num_channels": 3}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
WHISPER = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

# Model type: class, arguments of its configuration
DECODERS = {
    "llama": ("LlamaForCausalLM", GQA),
    "mistral": ("MistralForCausalLM", {**GQA, "sliding_window": WINDOW}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**GQA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**GQA, "head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", {**GQA, "head_dim": 8, "sliding_window": WINDOW}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**GQA, "head_dim": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    "phi3": ("Phi3ForCausalLM", GQA),
    "gpt2": ("GPT2LMHeadModel", SIZES),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "olmo2": ("Olmo2ForCausalLM", GQA),
    "smollm3": ("SmolLM3ForCausalLM", {**GQA, "no_rope_layer_interval": 2}),
    "stablelm": ("StableLmForCausalLM", GQA),
    "starcoder2": ("Starcoder2ForCausalLM", {**GQA, "sliding_window": WINDOW}),
    "granite": ("GraniteForCausalLM", GQA),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**GQA, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    ),
}
ENCODERS = {
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "electra": ("ElectraForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**SIZES, "local_attention": WINDOW, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "siglip_text_model": ("SiglipTextModel", SIZES),
}
IMAGE_ENCODERS = {
    "vit": ("ViTForImageClassification", IMAGE),
    "deit": ("DeiTForImageClassification", IMAGE),
    "dinov2": ("Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}),
    "siglip_vision_model": ("SiglipVisionModel", {**IMAGE, "vision_use_head": False}),
}
SEQUENCE_TO_SEQUENCE = {
    "bart": ("BartForConditionalGeneration", BART),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
}
FAMILIES = {**DECODERS, **ENCODERS, **IMAGE_ENCODERS, **SEQUENCE_TO_SEQUENCE}


def make_softmax_model(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny random model of Transformers in evaluation mode, its weights large enough for attention to matter."""
    class_name, arguments = FAMILIES[model_type]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**arguments, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def perturb(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Move what the converted layers gained away from where it starts, the mixtures to where the queries and keys are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gma_layers(model).values():
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(0.3 * noise)
    return model


def make_converted_model(model_type: str, seed: int = 0, overrides: dict | None = None, **options) -> PreTrainedModel:
    """A converted tiny model, all layers unless `options` say otherwise."""
    model = make_softmax_model(model_type, seed, **(overrides or {}))
    return perturb(convert_to_gma(model, num_components=6, **options))


def make_inputs(model_type: str, batch_size: int = 2, length: int = 13) -> dict[str, torch.Tensor]:
    """Inputs without padding, of a forward pass."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (batch_size, length), generator=generator)
    if model_type in IMAGE_ENCODERS:
        return {"pixel_values": torch.randn(batch_size, 3, 8, 8, generator=generator)}
    if model_type == "whisper":
        return {"input_features": torch.randn(batch_size, 8, 24, generator=generator), "decoder_input_ids": tokens}
    if model_type == "bart":
        source = torch.randint(3, VOCAB, (batch_size, length + 4), generator=generator)
        return {"input_ids": source, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def output_of(model: PreTrainedModel, **inputs) -> torch.Tensor:
    """The logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def add_adapter(model, config) -> None:
    """`model.add_adapter(config)`, where Transformers can: its newest versions ask for a PEFT that may not be released yet."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "The version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"`add_adapter` of Transformers {transformers.__version__}: {error}")
