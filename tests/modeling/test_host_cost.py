# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a layer costs on the host: calls into PyTorch of one decoding step, and the further calls that a padding mask costs. On a CPU,
and for small batches on a GPU, they are what a token takes.
"""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import gma_hf
from benchmarks.kernels.decoding_cpu import CountCalls
from gma_hf.cache_argument import CACHE_NAME


SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
# Calls per layer of one step, in all: the embeddings, the last norm and the head are of four layers
WANTED = {"paper": 90, "gated": 110, "gated + window": 130, "converted": 110, "converted + window": 140}
WANTED_OF_PADDING = 12
NUM_LAYERS = 4


def make_model(name: str):
    torch.manual_seed(0)
    window = {"window_size": 16} if "window" in name else {}
    if "converted" in name:
        llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=NUM_LAYERS, num_key_value_heads=4))
        return gma_hf.convert_to_gma(llama, num_components=16, **window).eval()
    config = gma_hf.GMAConfig.from_preset(
        name.split(" ")[0], **SIZES, num_hidden_layers=NUM_LAYERS, num_components=16, **window
    )
    return gma_hf.GMAForCausalLM(config).eval()


@pytest.fixture(params=list(WANTED))
def name(request):
    return request.param


@pytest.fixture
def tokens():
    return torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.quick
@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_decoding_step_makes_few_calls(name, tokens, batch_size):
    model, tokens = make_model(name), tokens[:batch_size]
    cache = DynamicCache(config=model.config)
    model(tokens, **{CACHE_NAME: cache})
    for _ in range(2):
        model(tokens[:, :1], **{CACHE_NAME: cache})
    with CountCalls() as calls:
        model(tokens[:, :1], **{CACHE_NAME: cache})
    # Rows of a batch have to be brought into the order of the heads
    assert calls.number / NUM_LAYERS <= WANTED[name] + (10 if batch_size > 1 else 0)


@pytest.mark.quick
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("where", ["left", "right", "between"])
def test_a_padding_mask_costs_few_calls(name, tokens, where, use_cache):
    model = make_model(name)
    mask = torch.ones_like(tokens)
    mask[0, {"left": slice(0, 10), "right": slice(30, 40), "between": slice(10, 20)}[where]] = 0
    numbers = []
    for attention_mask in (torch.ones_like(tokens), mask):
        for num_layers in (2, NUM_LAYERS):
            layers = (model.model.layers, model.config)
            model.model.layers, model.config.num_hidden_layers = layers[0][:num_layers], num_layers
            with CountCalls() as calls:
                model(tokens, attention_mask=attention_mask, use_cache=use_cache)
            model.model.layers, model.config.num_hidden_layers = layers[0], NUM_LAYERS
            numbers.append(calls.number)
    plain, padded = ((numbers[i + 1] - numbers[i]) / (NUM_LAYERS - 2) for i in (0, 2))
    assert padded - plain <= WANTED_OF_PADDING


def change_in_place(parameter):
    parameter.add_(0.5)


def change_data(parameter):
    parameter.data = parameter.data + 0.5


def load(parameter):
    parameter.copy_(torch.full_like(parameter, 0.25))


@pytest.mark.quick
@pytest.mark.parametrize("change", [change_in_place, change_data, load])
@pytest.mark.parametrize("name", ["gated + window", "converted + window"])
def test_what_is_kept_of_the_parameters_is_forgotten_when_they_change(name, tokens, change):
    """In the middle of a text: the next token is what a cache that keeps nothing gives."""
    model = make_model(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, **{CACHE_NAME: cache})
        model(tokens[:, :1], **{CACHE_NAME: cache})
        for part in (
            "mixture_norm.means",
            "mixture_norm.prior_logits",
            "window_norm.memory_bias",
            "conv.weight",
            "A_log_bias",
        ):
            changed = [parameter for other, parameter in model.named_parameters() if other.endswith(part)]
            for parameter in changed:
                change(parameter)
            fresh = DynamicCache(config=model.config)
            for layer, old in zip(
                gma_hf.modeling.adopt_cache(fresh, native_like(model)).layers, cache.layers, strict=True
            ):
                layer.advance(old.memory, old.cumulative_length)
                layer.num_plain = old.num_plain
            expected = model(tokens[:, :1], **{CACHE_NAME: fresh}).logits
            torch.testing.assert_close(model(tokens[:, :1], **{CACHE_NAME: cache}).logits, expected, rtol=0, atol=0)


def native_like(model):
    """A configuration by which a cache gets as many GMA layers as the model has."""
    return gma_hf.GMAConfig(num_hidden_layers=model.config.num_hidden_layers)


@pytest.mark.quick
def test_under_gradients_nothing_is_kept(tokens):
    model = make_model("gated + window").train()
    cache = DynamicCache(config=model.config)
    model(tokens, **{CACHE_NAME: cache})
    model(tokens[:, :1], **{CACHE_NAME: cache}).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not cache.layers[0].kept.names
