# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The small pretrained model: the folder loads, and its numbers are those of the weights that it holds."""

import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import pretraining
from benchmarks.quality.language_modeling import token_nll
from benchmarks.quality.tasks.corpora import save
from benchmarks.quality.tasks.language_modeling import load, tokenizer_folder
from gma_hf.training.text.tokenization import train_tokenizer


SIZES = (
    "--hidden_size 32 --layers 1 --heads 1 --intermediate_size 16 --components 8 --context 64 --tokens_per_step 256"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    text = "One token tells the next one, and the next one tells another. " * 60
    tokenizer = train_tokenizer(iter([text]), 300)
    path = folder / "small.pt"
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).to(torch.uint16)
    counts = {"test": {"words": len(text.split()), "lines": 1}}
    parts = {"train": tokens, "wikipedia_valid": tokens, "wikitext_test": tokens}
    save({"tokens": parts, "counts": counts, "vocab_size": len(tokenizer)}, path)
    tokenizer.save_pretrained(tokenizer_folder(path))
    command = f"pretraining.py --prepared {path} --output_dir {folder / 'model'} --preset gated --minutes 1 {SIZES}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command.split(), "--max_steps", "60", "--no-compile"])
        pretraining.main()
    return folder


def test_the_folder_loads_and_has_learned(folder):
    measured = json.loads((folder / "model" / "measured.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert measured["steps"] == 60 and measured["tokens"] == 60 * 256
    # The text repeats twelve words: whoever has learned nothing is at the size of the vocabulary
    assert measured["wikipedia_valid_perplexity"] < len(tokenizer) / 2
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.dtype == torch.bfloat16


def test_what_was_measured_is_what_was_kept(folder):
    measured = json.loads((folder / "model" / "measured.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    whole, rest = token_nll(model, load(folder / "small.pt")["tokens"]["wikipedia_valid"], 64)
    nll = torch.cat([whole.flatten(), rest]).double().mean().item()
    assert measured["wikipedia_valid_perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)


def test_a_folder_that_holds_something_is_refused(folder, monkeypatch, capsys):
    command = f"pretraining.py --prepared {folder / 'small.pt'} --output_dir {folder / 'model'}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        pretraining.main()
    assert "Choose a new folder" in capsys.readouterr().err
