# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks that time models on a GPU: their steps run on a processor too, and compute what they say that they time."""

from functools import partial

import pytest
import torch

from benchmarks.conversion import speed
from benchmarks.kernels import decoding_gpu, training_gpu
from benchmarks.kernels.models import MODELS, make_model
from benchmarks.lib.timing import or_refused


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_components": 4, "vocab_size": 64,
    "max_position_embeddings": 512,
}  # fmt: skip
TOY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 64,
}  # fmt: skip


@pytest.fixture
def on_a_processor(monkeypatch):
    """Nothing is compiled, and what only a GPU can measure is left out."""
    monkeypatch.setattr(training_gpu, "compile_blocks", lambda model, dynamic: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    monkeypatch.setattr(speed, "median_time", lambda function, seconds: function() or 1.0)
    monkeypatch.setattr(speed, "peak_bytes", lambda function: (function(), 2**30))
    monkeypatch.setitem(speed.SHAPES, "toy", TOY)


@pytest.mark.parametrize("name", training_gpu.MODELS)
def test_a_step_of_training_has_the_loss_of_the_model(name, on_a_processor, monkeypatch):
    """The mean over two forward passes of one update is the loss that the model itself computes for all rows."""
    drawn = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    parts = list(drawn.split(2))
    training = training_gpu.Training(make_model(name, SIZES, "cpu"), context=16, tokens=64, micro_tokens=32)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: parts.pop(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = make_model(name, SIZES, "cpu")(drawn, labels=drawn, use_cache=False).loss
    # Logits are rounded to bfloat16, by 0.4%, and many of them are averaged
    torch.testing.assert_close(training.step(), expected, rtol=1e-3, atol=0)
    assert not parts


@pytest.mark.parametrize("name", MODELS)
def test_decoding_is_timed_at_every_position_that_fits(name, on_a_processor, monkeypatch):
    decoding = decoding_gpu.Decoding(make_model(name, SIZES, "cpu").eval(), "eager", batch=2, seconds=0)
    for position in (128, 256):
        row = or_refused(partial(decoding.measure, position))
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["ms_per_token"])
        counted = [layer.get_seq_length() for layer in decoding.cache.layers]
        assert counted == [position, position]  # the steps of the last round end there
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    refused = or_refused(partial(decoding.measure, 256))
    # Softmax needs keys and values; the state of a GMA model is there already
    assert ("refused" in refused) == (name == "softmax + RoPE")


@pytest.mark.parametrize("name", speed.MODELS)
def test_caches_of_converted_models_are_measured(name, on_a_processor):
    """Keys and values grow with the position: 2 layers of 2 x 1 head of 16 numbers in float32. States do not."""
    model = speed.make_model("toy", name, None, "cpu").float()
    assert (
        speed.measure(model, name, "prefill", 0.0, {"mode": "eager", "batch": 2, "length": 300})["prefill_ms"] == 1.0
    )
    sizes = []
    for position in (320, 640):
        row = speed.measure(model, name, "decode", 0.0, {"mode": "eager", "position": position})
        assert row["ms_per_token"] > 0
        sizes.append(2**20 * row["cache_mib"])
    if name.startswith("original"):
        # In front of the steps that are timed
        assert sizes == [2 * 2 * 16 * 4 * (position - speed.STEPS) for position in (320, 640)]
    else:
        state = 2 * 2 * 64 * (16 + 1) * 4  # S and z of 2 heads with 64 components, in each layer
        assert sizes[0] == sizes[1] >= state
        assert (sizes[0] == state) == (name == "GMA")
