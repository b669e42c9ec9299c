# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`LoraConfig()` without target modules adapts what it adapts by default in the original model."""

import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import gma_hf
from tests.conftest import BLOCKS, make_model, tiny_config
from tests.conversion.tiny_models import SIZES, add_adapter, make_converted_model, make_inputs, make_softmax_model
from tests.test_remote_code import run_program


peft = pytest.importorskip("peft")


def adapted(model, config=None) -> set[str]:
    """The names of the modules that an adapter was put into."""
    wrapped = peft.get_peft_model(model, config or peft.LoraConfig(r=2))
    layers = (
        name for name, module in wrapped.named_modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    )
    return {name.removeprefix("base_model.model.") for name in layers}


def update(model, tokens):
    """The size of the gradient of every matrix of the adapters."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.abs().sum().item() for name, p in wrapped.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "bart", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"layers": [1], "window_size": 3}], ids=["all", "one layer kept"])
def test_a_converted_model_is_adapted_where_its_original_is(model_type, options):
    expected = adapted(make_softmax_model(model_type))
    assert expected
    assert adapted(make_converted_model(model_type, **options)) == expected


@pytest.mark.parametrize("block", list(BLOCKS))
def test_a_native_model_is_adapted_where_llama_is(block):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 3}))
    assert (
        adapted(model)
        == adapted(llama)
        == {f"model.layers.{index}.self_attn.{name}" for index in range(3) for name in ("q_proj", "v_proj")}
    )


@pytest.mark.parametrize(
    "make", [lambda: make_converted_model("llama"), lambda: make_model(gma_hf.GMAForCausalLM, tiny_config())]
)
def test_every_default_adapter_learns(make):
    gradients = update(make(), make_inputs("llama")["input_ids"])
    assert len(gradients) >= 8
    assert all(gradient > 0 for gradient in gradients.values()), gradients


def test_other_methods_have_defaults_too():
    for config in (peft.IA3Config(), peft.AdaLoraConfig(r=2, init_r=2, total_step=10), peft.VeraConfig(r=2)):
        expected = adapted(make_softmax_model("llama"), config)
        config.target_modules = None
        assert adapted(make_converted_model("llama"), config) == expected


def test_injected_adapters_find_their_modules():
    model = make_converted_model("llama")
    plain = {name for name, _ in model.named_modules()}
    add_adapter(model, peft.LoraConfig(r=2))
    found = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert found == {name for name in plain if name.endswith((".q_proj", ".v_proj"))}
    for name in found:
        module = model.get_submodule(name)
        assert module.lora_B["default"].weight.shape[1] == module.lora_A["default"].weight.shape[0] == 2


def test_gma_hf_does_not_import_peft(tmp_path):
    source = """
import sys
import gma_hf
gma_hf.GMAConfig().to_dict()
assert "peft" not in sys.modules, "peft"
print("no peft")
"""
    assert "no peft" in run_program(source, tmp_path).stdout
    assert "peft" in sys.modules
