# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Stand-ins for the folders that the examples of docs/ecosystem.md load."""

import pytest

import gma_hf
from gma_hf.training import train_tokenizer
from tests.conftest import make_model, tiny_config


TEXTS = ["import os\n" * 20, "def read_lines(path):\n    return path\n", "import json, math, sys\nprint(json)\n"]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def demo_model(tokenizer, tmp_path, monkeypatch):
    """What `make demo-train` leaves behind, but tiny: a model and its tokenizer in outputs/demo_train below the current folder."""
    model = make_model(
        gma_hf.GMAForCausalLM,
        tiny_config(
            "gated",
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
    )
    model.save_pretrained(tmp_path / "outputs" / "demo_train")
    tokenizer.save_pretrained(tmp_path / "outputs" / "demo_train")
    monkeypatch.chdir(tmp_path)
    return model
