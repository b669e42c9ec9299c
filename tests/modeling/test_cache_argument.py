# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A model goes on from the cache that it was given. Versions of Transformers call the argument by different names, and ignore the
arguments that they do not know: whatever the name, a cache is used or refused.
"""

import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

import gma_hf
from gma_hf.cache_argument import CACHE_NAME, OLD_CACHE_NAME
from tests.conftest import TINY, make_model, tiny_config
from tests.modeling.test_generation_refusals import MODELS


pytestmark = pytest.mark.quick
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
HAS_TWO_NAMES = CACHE_NAME != OLD_CACHE_NAME
HEADS = {
    "GMAModel": gma_hf.GMAModel,
    "GMAForCausalLM": gma_hf.GMAForCausalLM,
    "GMAForSequenceClassification": gma_hf.GMAForSequenceClassification,
    "GMAForTokenClassification": gma_hf.GMAForTokenClassification,
    "GMAForQuestionAnswering": gma_hf.GMAForQuestionAnswering,
}
UNKNOWN_NAMES = ["past_key_value", "cache_params", "layer_past", "mems", *([] if HAS_TWO_NAMES else ["cache"])]


def go_on(model, tokens, name: str):
    """The last tokens, behind a cache of the others that is passed by some name."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :12], **{name: cache})
    assert int(cache.get_seq_length()) == 12
    outputs = model(tokens[:, 12:], **{name: cache})
    assert int(cache.get_seq_length()) == 19
    assert outputs[name] is cache
    assert getattr(outputs, name) is cache
    return outputs.logits


@pytest.mark.parametrize("name", MODELS)
def test_the_name_of_the_installed_version_works_without_a_warning(name, tokens):
    model = MODELS[name]()
    assert CACHE_NAME in inspect.signature(model.forward).parameters
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(go_on(model, tokens, CACHE_NAME), model(tokens).logits[:, 12:], **CLOSE)


@pytest.mark.skipif(not HAS_TWO_NAMES, reason="the installed Transformers has one name")
@pytest.mark.parametrize("name", MODELS)
def test_the_old_name_works_with_a_warning(name, tokens):
    model = MODELS[name]()
    with torch.no_grad(), pytest.warns(FutureWarning, match="`past_key_values` is deprecated.*Use `cache` instead"):
        torch.testing.assert_close(go_on(model, tokens, OLD_CACHE_NAME), model(tokens).logits[:, 12:], **CLOSE)
    with torch.no_grad(), pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        prompt = tokens[:1, :13]
        cache = model(prompt[:, :12], use_cache=True)[CACHE_NAME]
        length = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(prompt, past_key_values=cache, **length), model.generate(prompt, **length))


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
@pytest.mark.parametrize("model_name", [*HEADS, "converted", "partly converted"])
def test_a_cache_under_an_unknown_name_is_an_error(model_name, name, tokens):
    model = MODELS[model_name]() if model_name in MODELS else make_model(HEADS[model_name], tiny_config("gated"))
    with torch.no_grad():
        cache = model.base_model(tokens[:, :12], use_cache=True)[CACHE_NAME]
        with pytest.raises(ValueError, match=f"A cache was passed as `{name}`.* pass the cache as `{CACHE_NAME}`"):
            model(tokens[:, 12:], **{name: cache})
        # Nothing happened to the cache, and the advice works
        torch.testing.assert_close(
            model.base_model(tokens[:, 12:], **{CACHE_NAME: cache})[0], model.base_model(tokens)[0][:, 12:], **CLOSE
        )


def test_an_encoder_refuses_a_cache_whatever_its_name(tokens):
    model = make_model(gma_hf.GMAForMaskedLM, tiny_config("gated", is_causal=False))
    for name in {CACHE_NAME, OLD_CACHE_NAME, "cache", "past_key_value"}:
        with pytest.raises(ValueError, match="cache"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(tokens, **{name: DynamicCache()})


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_without_a_cache_are_an_error(name, tokens):
    model = MODELS[name]()
    states = torch.zeros(2, 4, 3, 8)
    legacy = tuple((states, states) for _ in range(3))
    if "converted" in name:
        model = model.model
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` is a tuple, and must be a `Cache`"):
        model(tokens, **{CACHE_NAME: legacy})


@pytest.mark.skipif(not HAS_TWO_NAMES, reason="the installed Transformers has one name")
@pytest.mark.parametrize("name", MODELS)
def test_of_two_names_the_one_with_the_cache_counts(name, tokens):
    model = MODELS[name]()
    with torch.no_grad():
        expected = model(tokens).logits[:, 12:]
        for place, other in ((CACHE_NAME, OLD_CACHE_NAME), (OLD_CACHE_NAME, CACHE_NAME)):
            cache = model(tokens[:, :12], use_cache=True)[CACHE_NAME]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                logits = model(tokens[:, 12:], **{place: cache, other: None}).logits
            torch.testing.assert_close(logits, expected, **CLOSE)
        with pytest.raises(ValueError, match="Two different caches were passed, as `cache` and as `past_key_values`"):
            model(tokens, **{CACHE_NAME: DynamicCache(), OLD_CACHE_NAME: DynamicCache()})


def test_a_layer_by_itself_takes_the_cache_by_the_same_name(block):
    model = make_model(gma_hf.GMAModel, tiny_config(block))
    for layer in model.layers:
        assert CACHE_NAME in inspect.signature(layer.self_attn.forward).parameters


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_collects_no_caches(name, tokens, tmp_path):
    model = MODELS[name]()
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    _, outputs, _ = trainer.prediction_step(
        model, {"input_ids": tokens, "labels": tokens, "use_cache": True}, prediction_loss_only=False
    )
    assert isinstance(outputs, torch.Tensor)
    assert outputs.shape == (2, 19, TINY["vocab_size"])


def test_prompt_tuning_generates_what_it_computes_without_a_cache():
    peft = pytest.importorskip("peft")
    for make in MODELS.values():
        torch.manual_seed(0)
        options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = peft.get_peft_model(make(), options).eval()
        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
        expected = prompt = torch.arange(3, 15)[None]
        with torch.no_grad():
            for _ in range(8):
                expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
        seen = []
        layer = model.base_model.model.layers[0]
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
        got = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(got, expected)
        # The learned prompt stands before the text, and not before each new token
        assert seen == [16] + [1] * 7
