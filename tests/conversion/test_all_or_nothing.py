# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Converting, reverting and calibrating are all or nothing: after an error the model is what it was before."""

import copy

import pytest
import torch
import transformers
from torch import nn

from gma_hf import convert_to_gma, gma_layers, revert_to_softmax
from gma_hf.conversion import calibrate, convert, rank_layers
from gma_hf.conversion.calibration import calibrate as calibration
from gma_hf.conversion.checkpoints import install
from gma_hf.conversion.runtime.layer import GMAConversion
from tests.conversion.tiny_models import add_adapter, make_converted_model, make_inputs, make_softmax_model, output_of


OUT_OF_MEMORY = torch.OutOfMemoryError("out of memory")
ERRORS = [ValueError("an error"), KeyboardInterrupt(), OUT_OF_MEMORY, SystemExit(1)]


def identity(model):
    """Everything of a model that a user can see, but for what it computes."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "class": type(model),
        "config": (id(model.config), type(model.config), copy.deepcopy(model.config.to_dict())),
        "implementation": model.config._attn_implementation,
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [[list(getattr(module, name).values()) for name in hooks] for module in model.modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "configs": [id(getattr(module, "config", None)) for module in model.modules()],
    }


@pytest.fixture
def tokens():
    return make_inputs("llama")["input_ids"]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (GMAConversion, "__init__", 3),  # while layers are built: the third of four
        (GMAConversion, "reset_parameters", 2),  # while they are initialised
        (nn.Module, "register_forward_pre_hook", 3),  # while they are swapped in
        (convert, "exchange_class", 1),
        (convert, "use_linear_masks", 1),
        (install, "converted_view", 1),
        (install, "watch_model", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_anywhere_in_a_conversion_leaves_the_model_as_it_was(owner, name, calls, error, tokens, monkeypatch):
    model = make_softmax_model("llama", num_hidden_layers=4)
    model.model.layers[1].train()
    before, expected = identity(model), output_of(model, input_ids=tokens)
    original, count = getattr(owner, name), 0

    def fail(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(error)):
        convert_to_gma(model, num_components=6)
    assert count == calls
    assert identity(model) == before
    assert torch.equal(output_of(model, input_ids=tokens), expected)

    monkeypatch.undo()
    convert_to_gma(model, num_components=6)
    assert type(model).__name__ == "GMALlamaForCausalLM" and len(gma_layers(model)) == 4
    revert_to_softmax(model)
    assert torch.equal(output_of(model, input_ids=tokens), expected)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_while_the_model_is_looked_at_leaves_it_as_it_was(error, tokens, monkeypatch):
    model = make_softmax_model("llama").train()
    before = identity(model)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", fail)
    with pytest.raises((type(error), ValueError)):
        convert_to_gma(model)
    assert identity(model) == before


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["remove_layers", "exchange_class", "exchange_config"])
@pytest.mark.parametrize("options", [{}, {"layers": [1], "window_size": 3}], ids=["all", "one layer kept"])
def test_an_error_in_a_reversion_leaves_the_model_converted(options, name, error, tokens, monkeypatch):
    model = make_converted_model("llama", **options)
    before, expected = identity(model), output_of(model, input_ids=tokens)
    original = getattr(convert, name)

    def fail_at_the_end(*args, **kwargs):
        original(*args, **kwargs)
        raise error

    monkeypatch.setattr(convert, name, fail_at_the_end)
    with pytest.raises(type(error)):
        revert_to_softmax(model)
    assert identity(model) == before
    assert torch.equal(output_of(model, input_ids=tokens), expected)
    monkeypatch.undo()
    assert type(revert_to_softmax(model)) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["fit_mixtures", "choose_width"])
def test_an_error_in_a_calibration_leaves_the_mixtures_as_they_were(name, error, tokens, monkeypatch):
    model = make_converted_model("llama", window_size=3)
    before, values = identity(model), copy.deepcopy(model.state_dict())
    original, count = getattr(calibration, name), 0

    def fail_at_the_second_layer(*args, **kwargs):
        nonlocal count
        count += 1
        result = original(*args, **kwargs)
        if count == 2:
            raise error
        return result

    monkeypatch.setattr(calibration, name, fail_at_the_second_layer)
    with pytest.raises(MemoryError if error is OUT_OF_MEMORY else type(error)):
        calibrate(model, [tokens] * 3, progress=False)
    assert identity(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_in_a_ranking_leaves_the_model_unconverted(error, tokens, monkeypatch):
    model = make_softmax_model("llama")
    before = identity(model)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(gma_layers.__globals__["GMAConversion"], "forward", fail)
    with pytest.raises((type(error), MemoryError)):
        rank_layers(model, [tokens] * 3, progress=False, num_components=6)
    assert identity(model) == before


def test_a_model_that_lost_a_layer_by_hand_can_still_be_reverted(tokens):
    expected = output_of(make_softmax_model("llama"), input_ids=tokens)
    model = make_converted_model("llama")
    del model.model.layers[0].self_attn.gma
    with pytest.raises(ValueError, match="`revert_to_softmax\\(model\\)` first"):
        convert_to_gma(model)
    with pytest.raises(ValueError, match="has no mixtures"):
        model(tokens)
    assert torch.equal(output_of(revert_to_softmax(model), input_ids=tokens), expected)


def test_parts_and_wrappers_of_converted_models_say_what_to_call_instead(tokens):
    model = make_converted_model("llama")
    with pytest.raises(
        ValueError, match=r"holds layers that are converted already \(layers.0.self_attn, layers.1.self_attn\)"
    ):
        convert_to_gma(model.model)
    with pytest.raises(ValueError, match="is a part of a converted model, and cannot be reverted alone"):
        revert_to_softmax(model.model)
    with pytest.raises(
        ValueError, match=r"is a wrapper around a converted GMALlamaForCausalLM. Take the model out of it"
    ):
        revert_to_softmax(nn.DataParallel(model))
    with pytest.raises(ValueError, match="str was not converted"):
        revert_to_softmax("folder")


def test_a_model_without_weights_is_refused(tokens):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(make_softmax_model("llama").config)
    with pytest.raises(
        ValueError, match=r"have no values \(meta device\), such as model.embed_tokens.weight. Load the model"
    ):
        convert_to_gma(model)
    assert type(model) is transformers.LlamaForCausalLM


def test_adapters_before_the_conversion_are_refused_and_after_it_are_welcome(tokens, tmp_path):
    """`save_pretrained` of a model with `add_adapter` saves the adapters alone: the mixtures would be lost."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = make_softmax_model("llama")
    add_adapter(model, lora)
    before, expected = identity(model), output_of(model, input_ids=tokens)
    with pytest.raises(ValueError, match="Convert the model first and add adapters to the converted model"):
        convert_to_gma(model)
    assert identity(model) == before and torch.equal(output_of(model, input_ids=tokens), expected)

    converted = make_converted_model("llama")
    converted.save_pretrained(tmp_path / "converted")
    add_adapter(converted, lora)
    expected = output_of(converted, input_ids=tokens)
    converted.save_pretrained(tmp_path / "adapter")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    loaded.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(output_of(loaded, input_ids=tokens), expected)
