# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Exported to ONNX, models compute the same in onnxruntime, for any batch and length, with padding wherever it stands."""

import pytest
import torch
from torch import nn

import gma_hf
from tests.conversion.tiny_models import make_softmax_model


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs what was exported")
pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def native(model_class, **options):
    torch.manual_seed(0)
    return model_class(gma_hf.GMAConfig.from_preset(**{**SIZES, "num_components": 8, **options})).eval()


def converted(model_type, **options):
    model = make_softmax_model(model_type, max_position_embeddings=128, num_hidden_layers=1)
    return gma_hf.convert_to_gma(model, num_components=8, **options)


MODELS = {
    "encoder": lambda: native(gma_hf.GMAModel, preset="paper", is_causal=False),
    "encoder with a window": lambda: native(gma_hf.GMAModel, preset="gated", is_causal=False, window_size=8),
    "converted encoder": lambda: converted("bert"),
    "converted encoder with a window": lambda: converted("bert", window_size=8),
    "causal": lambda: native(gma_hf.GMAForCausalLM, preset="paper", num_hidden_layers=1),
    "converted causal": lambda: converted("llama"),
}


class Called(nn.Module):
    """A model by the two arguments that the ONNX program has, and its first output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Tokens with padding on the right of the first row, and in the middle of the last."""
    input_ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(input_ids)
    mask[0, -3 - seed :], mask[-1, 1] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_same(session, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = model(**inputs)
    (actual,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    # float32 rounds at 6e-8; two layers and sums over some tens of numbers amplify it
    is_real = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(actual)[is_real], expected[is_real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_computes_the_same_for_every_batch_and_length(name, tmp_path):
    model, path = Called(MODELS[name]()).eval(), tmp_path / "model.onnx"
    names = ["input_ids", "attention_mask"]
    any_shape = {part: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")} for part in names}
    options = {"dynamo": True, "verbose": False, "input_names": names, "dynamic_shapes": any_shape}
    torch.onnx.export(model, (), path, kwargs=batch(2, 40, seed=0), **options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for seed, (rows, length) in enumerate([(2, 40), (1, 7), (5, 100), (3, 41)]):
        assert_same(session, model, batch(rows, length, seed=seed))
