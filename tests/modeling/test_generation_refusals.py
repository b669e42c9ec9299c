# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What Transformers' generation cannot do with GMA layers is refused before anything is generated."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from tests.conftest import HYBRID_LAYERS, TINY, make_model, tiny_config


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if name != "num_components"}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


MODELS = {
    "native": lambda: make_model(gma_hf.GMAForCausalLM, tiny_config("gated")),
    "hybrid": lambda: make_model(gma_hf.GMAForCausalLM, tiny_config("gated", layer_types=HYBRID_LAYERS)),
    "converted": lambda: gma_hf.convert_to_gma(llama(), num_components=6),
    "partly converted": lambda: gma_hf.convert_to_gma(llama(), num_components=6, layers=[0, 2]),
}
PROMPTS = [[10, 11, 12], [13, 14, 15, 16]]


@pytest.mark.parametrize("name", MODELS)
def test_continuous_batching_is_refused_up_front(name):
    model = MODELS[name]()
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    words = "GMA layers that Transformers' continuous batching cannot serve"
    with pytest.raises(ValueError, match=words):
        model.generate_batch(PROMPTS, generation_config=options)
    with pytest.raises(ValueError, match=words):
        model.init_continuous_batching(generation_config=options)
    with pytest.raises(ValueError, match=words), model.continuous_batching_context_manager(generation_config=options):
        pass
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor(PROMPTS[:1]), cache_implementation="paged", max_new_tokens=4)
    # The advice works
    generated = model.generate(torch.tensor(PROMPTS[:1]), generation_config=options)
    expected = model(generated[:, :-1], use_cache=False).logits[:, 2:].argmax(dim=-1)
    assert torch.equal(generated[:, 3:], expected) and generated.shape == (1, 7)


@pytest.mark.parametrize("name", MODELS)
def test_a_gma_model_is_no_assistant(name):
    calls, target = [], llama()
    target.register_forward_pre_hook(lambda *_: calls.append(None))
    with pytest.raises(ValueError, match="cannot be the `assistant_model`"):
        target.generate(torch.tensor(PROMPTS[:1]), assistant_model=MODELS[name](), max_new_tokens=4)
    assert not calls, "the target had begun to generate"


def test_a_model_that_does_not_generate_gains_no_way_to_generate():
    encoder = gma_hf.convert_to_gma(llama().model, num_components=6)
    assert not hasattr(encoder, "generate_batch")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [5, 12])
def test_a_prompt_no_longer_than_its_cache_is_told_so(name, length):
    model, tokens = MODELS[name](), torch.arange(3, 15)[None]
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match=r"seen 12 tokens.*takes the whole text.*at least one new token"):
        model.generate(tokens[:, :length], **{CACHE_NAME: cache}, **arguments)
    # The advice works
    longer = torch.cat([tokens, torch.tensor([[20]])], dim=1)
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    generated = model.generate(longer, **{CACHE_NAME: cache}, **arguments)
    assert torch.equal(generated, model.generate(longer, **arguments))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # PEFT 0.21 uses the old name
@pytest.mark.parametrize("name", MODELS)
def test_prefix_tuning_is_refused_and_prompt_tuning_works(name):
    peft = pytest.importorskip("peft")
    tokens = torch.arange(3, 15)[None]
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    tuned = peft.get_peft_model(MODELS[name](), peft.PrefixTuningConfig(**options))
    with pytest.raises(
        ValueError, match=r"prefix tuning .*PrefixTuningConfig.* use prompt tuning .*PromptTuningConfig"
    ):
        tuned(tokens)
    tuned = peft.get_peft_model(MODELS[name](), peft.PromptTuningConfig(**options))
    tuned(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
