# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Models that version 0.1 saved load, and answer as they did then: `data/version_0_1` holds both."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import gma_hf  # noqa: F401 (registers the models)


FOLDER = Path(__file__).parent / "data" / "version_0_1"
MODELS = ["paper", "gated_window_hybrid", "converted_llama", "converted_llama_plain", "converted_bert"]


@pytest.mark.quick
@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_the_logits_that_it_gave(name, trust_remote_code):
    auto_class = AutoModelForMaskedLM if "bert" in name else AutoModelForCausalLM
    model = auto_class.from_pretrained(FOLDER / name, trust_remote_code=trust_remote_code).eval()
    answers = load_file(FOLDER / "answers.safetensors")
    with torch.no_grad():
        logits = model(answers["input_ids"]).logits
    # Another order of the same float32 sums: some units in the last place of logits below 10, through a few layers
    torch.testing.assert_close(logits, answers[name], rtol=0, atol=2e-5)
