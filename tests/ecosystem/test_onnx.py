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
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def native(model_class, **options):
    torch.manual_seed(0)
    return model_class(gma_hf.GMAConfig.from_preset(**{**SIZES, "num_components": 8, **options})).eval()


def converted(model_type, **options):
    model = make_softmax_model(model_type, max_position_embeddings=128, num_hidden_layers=1)
    return gma_hf.convert_to_gma(model, num_components=8, **options)


def alike(model):
    """The model with components that are all alike, so that no token prefers any of them and no token has a correlation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mixture_norm.means", "mixture_norm.raw_variances")):
                parameter.copy_(parameter[:, :1].expand_as(parameter))
            elif name.endswith("mixture_norm.prior_logits"):
                parameter.zero_()
    return model


MODELS = {
    "encoder": lambda: native(gma_hf.GMAModel, preset="paper", is_causal=False),
    "encoder with a window": lambda: native(gma_hf.GMAModel, preset="gated", is_causal=False, window_size=8),
    "converted encoder": lambda: converted("bert"),
    "converted encoder with a window": lambda: converted("bert", window_size=8),
    "causal": lambda: native(gma_hf.GMAForCausalLM, preset="paper"),
    "causal, correlated": lambda: native(gma_hf.GMAForCausalLM, preset="correlated"),
    "causal with a window": lambda: native(gma_hf.GMAForCausalLM, preset="gated", window_size=8),
    "causal with a window and sink tokens": lambda: native(
        gma_hf.GMAForCausalLM, preset="gated", window_size=8, num_sink_tokens=2
    ),
    "converted causal": lambda: converted("llama"),
    "converted causal with a window": lambda: converted("llama", window_size=8),
    "converted causal with a window and sink tokens": lambda: converted("llama", window_size=8, num_sink_tokens=2),
}


class Called(nn.Module):
    """A model by the two arguments that the ONNX program has, and its first output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def batch(rows: int, length: int, seed: int, padding: str = "right") -> dict[str, torch.Tensor]:
    """
    Tokens with padding in the middle of the last row, and in the first row on one side, or on the right of all but three
    tokens, or nowhere.
    """
    input_ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(input_ids)
    side = {"right": slice(-3 - seed, None), "left": slice(3 + seed), "most": slice(3, None), "none": slice(0)}[
        padding
    ]
    mask[0, side] = 0
    if rows > 1 and padding != "none":
        mask[-1, 1] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_same(session, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = model(**inputs)
    actual = torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])
    # float32 rounds at 6e-8; a layer and sums over some tens of numbers amplify it
    is_real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[is_real], expected[is_real], atol=2e-5, rtol=2e-5)
    # Tokens that are not real mean nothing, but NaN would spread to whatever sums over them
    assert actual.isfinite().all()


def export(model: nn.Module, path, inputs: dict[str, torch.Tensor], **options):
    options = {"dynamo": True, "verbose": False, "input_names": list(inputs), **options}
    torch.onnx.export(model, (), path, kwargs=inputs, **options)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.timeout(1500)  # the exporter takes half a minute of one processor for a model with open lengths
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_computes_the_same_for_every_batch_and_length(name, tmp_path):
    model, inputs = Called(MODELS[name]()).eval(), batch(2, 40, seed=0)
    any_shape = {part: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")} for part in inputs}
    session = export(model, tmp_path / "model.onnx", inputs, dynamic_shapes=any_shape)
    for seed, (rows, length) in enumerate([(2, 40), (1, 7), (5, 100), (3, 41)]):
        for padding in ("right", "left", "most", "none"):
            assert_same(session, model, batch(rows, length, seed, padding))


# The encoder's rows are as long as usual; few tokens take other ways in a program that is not exported
FIXED = {
    "encoder": (MODELS["encoder"], 3, 30),
    "causal with a window and sink tokens": (MODELS["causal with a window and sink tokens"], 3, 7),
    "causal, correlated, no preferences": (
        lambda: alike(native(gma_hf.GMAForCausalLM, preset="correlated")),
        1,
        6,
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_model_exported_for_one_shape_computes_the_same(name, tmp_path):
    make, rows, length = FIXED[name]
    model = Called(make()).eval()
    session = export(model, tmp_path / "model.onnx", batch(rows, length, seed=0))
    for padding in ("right", "left", "most", "none"):
        assert_same(session, model, batch(rows, length, seed=1, padding=padding))
