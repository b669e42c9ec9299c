# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Models beyond the table: what goes through the attention interface is converted, and what cannot be is told apart."""

import pytest
import torch
import transformers

from gma_hf import convert_to_gma, gma_layers
from tests.conversion.tiny_models import BART, GQA, SIZES, VOCAB, perturb


IMAGE_TOKEN = 110
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def tokens():
    return torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


def build(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


def encoder_decoder():
    encoder = transformers.BertModel(transformers.BertConfig(**SIZES))
    decoder_config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.BertLMHeadModel(decoder_config))
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    return model.eval()


GENERATORS = {
    "encoder as decoder": lambda: build(
        transformers.RobertaForCausalLM, transformers.RobertaConfig(**SIZES, is_decoder=True)
    ),
    "decoder alone": lambda: build(transformers.BartForCausalLM, transformers.BartConfig(**BART)),
    "encoder and decoder": encoder_decoder,
    "mixture of experts": lambda: build(
        transformers.MixtralForCausalLM, transformers.MixtralConfig(**GQA, num_local_experts=2)
    ),
    "one layer in two recurrent": lambda: build(
        transformers.Qwen3NextForCausalLM,
        transformers.Qwen3NextConfig(
            **GQA,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
}


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_generation_with_a_cache_is_generation_without(kind, tokens):
    model = perturb(convert_to_gma(GENERATORS[kind](), num_components=6))
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    arguments.update(output_logits=True, return_dict_in_generate=True)
    cached, plain = (model.generate(tokens, **arguments, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    # Tiny models may write one word again and again: what they say of all words tells more
    assert len(cached.logits) == 6
    for one, other in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_images_and_text(tokens, tmp_path):
    """A vision encoder and a language model in one: both are found, though no made-up image fits no made-up text."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**{**GQA, "vocab_size": 120}),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE_TOKEN,
    )
    model = perturb(convert_to_gma(build(transformers.LlavaForConditionalGeneration, config), num_components=6))
    assert [layer.is_causal for layer in gma_layers(model).values()] == [False, False, True, True]
    prompt = torch.cat([tokens[:1, :4], torch.full((1, 4), IMAGE_TOKEN), tokens[:1, 4:]], dim=1)
    inputs = {"input_ids": prompt, "pixel_values": torch.randn(1, 3, 28, 28)}
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    generated = model.generate(**inputs, **arguments)
    assert torch.equal(generated, model.generate(**inputs, **arguments, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**inputs, **arguments), generated)


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        ("DiffLlamaForCausalLM", GQA, "several attentions in one forward pass"),
        (
            "FalconH1ForCausalLM",
            {**GQA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
            "other things than keys and values",
        ),
        ("GPTJForCausalLM", {**SIZES, "rotary_dim": 4}, "not through Transformers' attention interface"),
    ],
)
def test_what_cannot_be_converted_says_why(model_class, config, message):
    model_class = getattr(transformers, model_class)
    with pytest.raises(ValueError, match=message):
        convert_to_gma(build(model_class, model_class.config_class(**config)))


def test_a_causal_text_encoder_without_a_cache(tokens):
    model = convert_to_gma(build(transformers.CLIPTextModel, transformers.CLIPTextConfig(**SIZES)), num_components=6)
    perturb(model)
    changed = tokens.clone()
    changed[:, -1] = 3 + (changed[:, -1] - 2) % (VOCAB - 3)
    before, after = (model(batch).last_hidden_state for batch in (tokens, changed))
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])


def test_albert_shares_its_mixtures_as_it_shares_its_layers(tokens):
    model = build(transformers.AlbertForMaskedLM, transformers.AlbertConfig(**SIZES, embedding_size=16))
    softmax = model(tokens).logits
    assert len(gma_layers(convert_to_gma(model, num_components=6, window_size=64))) == 1
    # The window covers everything, in every pass through the one layer: softmax attention itself
    torch.testing.assert_close(model(tokens).logits, softmax, rtol=1e-4, atol=1e-4)
