# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Training with sequences that are cut over processes: the memory of a converted layer would start anew on each of them, so every
way that leads there is refused by name.
"""

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel

from tests.conversion.tiny_models import make_converted_model, make_inputs, make_softmax_model, output_of


MESSAGE = "cut every sequence over processes.*Set `cp_size` and `sp_size` to 1"


@pytest.fixture
def tokens():
    return make_inputs("llama")["input_ids"]


@pytest.mark.parametrize(
    "options", [{}, {"layers": [1]}, {"window_size": 3}], ids=["all", "one layer kept", "windows"]
)
def test_transformers_is_told_that_a_converted_model_cannot(options):
    model = make_converted_model("llama", **options)
    if hasattr(model, "supports_context_parallel"):  # not in the oldest versions
        assert make_softmax_model("llama").supports_context_parallel
        assert not model.supports_context_parallel


@pytest.mark.parametrize("size", ["cp_enabled", "sp_enabled"])
@pytest.mark.parametrize("options", [{}, {"layers": [0]}, {"layers": [1]}], ids=["all", "first", "last"])
def test_a_forward_pass_is_refused_when_accelerate_cuts_sequences(size, options, tokens, monkeypatch):
    model = make_converted_model("llama", **options)
    expected = output_of(model, input_ids=tokens)
    with monkeypatch.context() as patch:
        # What `Accelerator(parallelism_config=...)` leaves behind in every process
        patch.setattr(ParallelismConfig, size, property(lambda self: True), raising=size in dir(ParallelismConfig))
        patch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig())
        for one in (model, model.model):
            with pytest.raises(ValueError, match=MESSAGE):
                one(tokens)
        make_softmax_model("llama")(tokens)
    assert torch.equal(output_of(model, input_ids=tokens), expected)


def test_accelerate_still_keeps_its_parallelism_where_the_guard_looks(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True)
        assert hasattr(accelerator.state, "parallelism_config")
        assert "parallelism_config" in AcceleratorState._shared_state
        config = ParallelismConfig()
        assert not config.cp_enabled and not getattr(config, "sp_enabled", False)  # older versions know no sp_enabled
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_forward_pass_is_refused_inside_of_context_parallel(tokens, monkeypatch):
    """PyTorch's own context manager replaces `scaled_dot_product_attention`, and GMA layers do not call it."""
    model = make_converted_model("llama")
    original = torch.nn.functional.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(context_parallel, "_replaced_functions", {})
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", original)
        context_parallel._distribute_function(original, torch.nn.functional, None, None, None)
        with pytest.raises(ValueError, match=MESSAGE):
            model(tokens)
        replaced = torch.nn.functional.scaled_dot_product_attention
        context_parallel._restore_function(replaced, torch.nn.functional)
        model(tokens)
