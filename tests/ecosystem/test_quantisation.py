# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Quantised models: linear layers in 8 or 4 bits, mixtures as they were, answers near those of the model in float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import gma_hf
from gma_hf.modeling import GMAMixture
from tests.conversion.tiny_models import make_softmax_model


def settings(kind: str):
    if kind == "torchao, 8 bits":
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=kind.endswith("8 bits"), load_in_4bit=kind.endswith("4 bits"))


# The largest error of a weight, as a share of the largest in its row or block: half a step of 8 bits is 1/254, of the
# 16 levels of 4 bits about 1/7. The answer of three layers may be off by some times that share of its own size.
LARGEST_ERROR = {"torchao, 8 bits": 0.02, "bitsandbytes, 8 bits": 0.02, "bitsandbytes, 4 bits": 0.25}


@pytest.mark.parametrize("kind", LARGEST_ERROR)
@pytest.mark.parametrize("model_kind", ["native", "converted"])
def test_answers_are_near_and_mixtures_unchanged(kind, model_kind, demo_model, tmp_path):
    model, folder = demo_model, tmp_path / "outputs" / "demo_train"
    if model_kind == "converted":
        folder = tmp_path / "converted"
        model = gma_hf.convert_to_gma(make_softmax_model("llama"), num_components=6)
        model.save_pretrained(folder)
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(kind), device_map="cpu")
    tokens = torch.randint(3, 90, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(tokens).logits, quantised(tokens).logits.float()
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < LARGEST_ERROR[kind]

    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, GMAMixture)}
    assert mixtures
    for name, mixture in mixtures.items():
        for key, value in mixture.state_dict().items():
            torch.testing.assert_close(quantised.get_submodule(name).state_dict()[key].float(), value, rtol=0, atol=0)
    assert quantised.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 22)
