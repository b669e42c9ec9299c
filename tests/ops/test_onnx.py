# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""An export to ONNX holds no operator that only this package knows."""

import pytest
import torch

from gma_hf.ops import gaussian_mixture_attention

from .problems import Problem


@pytest.mark.parametrize("causal", [True, False])
def test_an_exported_program_holds_plain_operators(causal, monkeypatch):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return gaussian_mixture_attention(*tensors, causal=causal)

    tensors = tuple(Problem(length=100).tensors().values())
    expected = Layer()(*tensors)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = torch.export.export(Layer(), tensors)
    assert not [node for node in exported.graph.nodes if "gma_hf" in str(node.target)]
    torch.testing.assert_close(exported.module()(*tensors), expected, rtol=1e-11, atol=1e-11)
