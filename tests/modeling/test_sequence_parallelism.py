# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A native model is not trained with sequences that are cut over processes: every memory would start anew there."""

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

import gma_hf
from tests.conftest import make_model, tiny_config


LLAMA = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {
    gma_hf.GMAForCausalLM: {},
    gma_hf.GMAForMaskedLM: {"is_causal": False},
    gma_hf.GMAForSequenceClassification: {},
    gma_hf.GMAModel: {},
}


@pytest.mark.quick
@pytest.mark.parametrize("block", ["paper", "windowed", "hybrid"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", ["cp_enabled", "sp_enabled"])
def test_sequences_that_are_cut_over_processes_are_refused(head, block, size, monkeypatch):
    model = make_model(head, tiny_config(block, **HEADS[head]))
    tokens = torch.randint(3, 99, (2, 19), generator=torch.Generator().manual_seed(1))
    if hasattr(model, "supports_context_parallel"):  # not in the oldest versions
        assert LlamaForCausalLM(LlamaConfig(**LLAMA)).supports_context_parallel
        assert not model.supports_context_parallel
    expected = model(tokens)[0]
    with monkeypatch.context() as patch:
        # What `Accelerator(parallelism_config=...)` leaves behind in every process
        patch.setattr(ParallelismConfig, size, property(lambda self: True), raising=size in dir(ParallelismConfig))
        patch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig())
        with pytest.raises(ValueError, match=r"cut every sequence over processes.*Set `cp_size` and `sp_size` to 1"):
            model(tokens)
    assert torch.equal(model(tokens)[0], expected)
