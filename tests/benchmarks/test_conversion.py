# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The conversion benchmarks run from end to end on a toy model, and show what they measured."""

import json
import sys

import torch
from transformers import BertConfig, BertModel

from benchmarks.conversion import minilm


def part(count: int, **labels) -> dict:
    lengths = torch.randint(3, 12, (count,), dtype=torch.int32)
    tokens = torch.randint(5, 60, (int(lengths.sum()),)).to(torch.uint16)
    return {"tokens": tokens, "lengths": lengths, **labels}


def test_a_sentence_encoder_is_converted_distilled_and_fine_tuned(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path / "model")
    prepared = {"train": part(64), "WikiText-103": part(8), "IMDB": part(8)}
    for split, count in (("train", 64), ("test", 10)):
        prepared[f"newsgroups {split}"] = part(count, labels=torch.randint(20, (count,)))
    torch.save(prepared, tmp_path / "prepared.pt")
    output, row = tmp_path / "rows.json", "all layers, GMA alone, random mixtures"
    words = ["--model", str(tmp_path / "model"), "--prepared", str(tmp_path / "prepared.pt"), "--minutes", "0.01"]
    words += ["--batch_size", "4", "--components", "4", "--epochs", "1", "--seeds", "1", "--rows", row]
    monkeypatch.setattr(sys, "argv", ["minilm.py", *words, "--output", str(output)])
    minilm.main()
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["original, softmax", row]
    for found in rows.values():
        # Of ten posts
        assert len(found["newsgroups"]) == 1 and found["newsgroups"][0] in [10.0 * n for n in range(11)]
    cosine = rows[row]["cosine"]["after distillation"]
    shown = f"| {row} | {cosine['WikiText-103']:.4f} | {cosine['IMDB']:.4f} | {rows[row]['newsgroups'][0]:.2f} |"
    assert shown in capsys.readouterr().out
