# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Long-context classification: padding changes nothing, models are equally large, the script goes on where it stopped."""

import json
import lzma
import sys

import numpy as np
import pytest
import torch

from benchmarks.quality.long_context_classification import CONTENDERS, accuracy, main, plot, table
from benchmarks.quality.tasks import listops
from benchmarks.quality.tasks.classification import Examples, batches_by_length, collate, load, prepare, without_hints
from benchmarks.rivals.mixers import equal_width, make_config, make_model, number_of_parameters
from gma_hf import GMAForSequenceClassification
from tests.benchmarks.expressions import evaluate


def tiny_model(contender: str, **sizes) -> GMAForSequenceClassification:
    mixer, overrides = CONTENDERS[contender]
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_components": 6,
        "intermediate_size": 32,
        "max_position_embeddings": 512,
        "vocab_size": listops.VOCAB_SIZE,
        "pad_token_id": listops.PAD,
        "num_labels": 10,
        "is_causal": False,
    }
    torch.manual_seed(0)
    config = make_config(mixer, **{**fields, **overrides, **sizes})
    return make_model(mixer, config, GMAForSequenceClassification).eval()


def some_expressions(count: int) -> Examples:
    return Examples(*listops.generate(count, 0, min_length=20, max_length=300, max_depth=5))


@pytest.mark.quick
def test_padding_is_masked_and_nothing_is_lost():
    examples = some_expressions(9)
    batch = collate([examples[i] for i in range(9)], pad_token_id=listops.PAD)
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["input_ids"].shape[1] % 256 == 0
    for i in range(9):
        real = batch["attention_mask"][i].bool()
        assert int(real.sum()) == examples.lengths[i]
        assert (batch["input_ids"][i, ~real] == listops.PAD).all()
        assert evaluate(batch["input_ids"][i, real]) == batch["labels"][i]
    seen = [int(label) for part in batches_by_length(examples, 0, 512) for label in part["labels"]]
    assert sorted(seen) == sorted(examples.labels.tolist())


@pytest.mark.parametrize("contender", list(CONTENDERS))
def test_logits_do_not_depend_on_the_padding(contender):
    """An example alone and among longer ones: the same logits, up to the order of float32 sums."""
    model = tiny_model(contender)
    examples = some_expressions(3)
    rows = sorted((examples[i] for i in range(3)), key=lambda row: len(row["input_ids"]))
    with torch.no_grad():
        together = model(**collate(rows, 0)).logits
        alone = model(torch.from_numpy(rows[0]["input_ids"].astype(np.int64))[None]).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_accuracy_counts_every_example_once():
    model, examples = tiny_model("gma_gated"), some_expressions(7)
    with torch.no_grad():
        right = [
            int(model(torch.from_numpy(row["input_ids"].astype(np.int64))[None]).logits.argmax()) == row["labels"]
            for row in map(examples.__getitem__, range(7))
        ]
    assert accuracy(model, examples, tokens_per_batch=512) == pytest.approx(sum(right) / 7)
    assert not model.training


@pytest.mark.quick
@pytest.mark.parametrize("contender", list(CONTENDERS))
def test_models_are_equally_large(contender):
    """At the sizes of the experiment, within 3% of the softmax model, the table of positions counted."""
    shared = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_components": 64,
        "intermediate_size": 704,
        "vocab_size": 257,
        "max_position_embeddings": 4096,
        "num_labels": 2,
        "is_causal": False,
    }
    mixer, overrides = CONTENDERS[contender]
    sizes = {**shared, **overrides}
    width = equal_width(mixer, sizes, "softmax", shared, GMAForSequenceClassification, (8,))
    own, softmax = (
        number_of_parameters(name, GMAForSequenceClassification, **fields)
        for name, fields in ((mixer, {**sizes, "intermediate_size": width}), ("softmax", shared))
    )
    assert abs(own - softmax) <= 0.03 * softmax


@pytest.mark.quick
def test_posts_lose_header_quotes_and_signature():
    post = "From: a@b.c\nSubject: Re: rockets\n\nA. Person writes:\n> what is thrust?\n\nIt is force.\nMass times speed.\n\n--\nNASA Ames"
    assert without_hints(post).strip() == "It is force.\nMass times speed."
    assert without_hints("From: a@b.c\n\nOne paragraph only.").strip() == "One paragraph only."


@pytest.fixture
def data(tmp_path):
    """Folders of the two text data sets, with a handful of texts."""
    for folder, classes in (("imdb", 2), ("20newsgroups", 20)):
        (tmp_path / folder).mkdir()
        for split, count in (("train", 40), ("test", 20)):
            with lzma.open(tmp_path / folder / f"{split}.jsonl.xz", "wt") as file:
                for i in range(count):
                    text = f"Header: {i}\n\n" + f"number {i} naïve " * (i + 1)
                    file.write(json.dumps({"text": text, "label": i % classes}) + "\n")
    return tmp_path


def test_prepared_texts_come_back(data):
    file = data / "prepared.pt.xz"
    prepare(data, file)
    reviews = load("imdb", file, [])
    assert [len(reviews[split]) for split in ("train", "valid", "test")] == [36, 4, 20]
    # Token b + 1 is byte b; 0 is left for padding
    assert (
        bytes((reviews["test"][3]["input_ids"] - 1).astype(np.uint8)).decode()
        == "Header: 3\n\n" + "number 3 naïve " * 4
    )
    posts = load("newsgroups", file, [])
    assert sorted(posts["test"].labels.tolist()) == list(range(20))
    assert posts["test"].lengths.min() >= 1 and posts["test"].tokens.max() < 8192


def test_the_script_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.json"
    options = ["--tasks", "listops", "--steps", "2", "--batch_size", "2", "--hidden_size", "32", "--layers", "2"]
    options += ["--heads", "2", "--components", "6", "--intermediate_size", "96", "--listops_sizes", "40", "4", "8"]
    options += ["--listops_lengths", "20", "120", "--output", str(output)]

    def call(*extra: str) -> str:
        monkeypatch.setattr(sys, "argv", ["long_context_classification.py", *options, *extra])
        main()
        return capsys.readouterr().out

    call("--contenders", "softmax")
    first = json.loads(output.read_text())["rows"]
    shown = call("--contenders", "softmax", "gma_gated")
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["listops, softmax, seed 0", "listops, gma_gated, seed 0"]
    assert rows["listops, softmax, seed 0"] == first["listops, softmax, seed 0"]
    for row in rows.values():
        # Of eight examples
        assert 8 * row["test_accuracy"] in range(9) and row["ms_per_step"] > 0 and row["test_examples"] == 8
        assert row["curve"][-1][0] == row["losses"][-1][0] == 2
    assert table(rows) in shown
    # Rows of another recipe are not mixed with these
    with pytest.raises(SystemExit, match="Choose another --output"):
        call("--contenders", "softmax", "--batch_size", "4")
    call("--plot")
    assert (tmp_path / "long_context_classification.png").exists()
    scores, times = plot(rows).axes
    assert [bar.get_width() for bar in scores.patches] == [100 * row["test_accuracy"] for row in rows.values()]
    assert [bar.get_width() for bar in times.patches] == [row["ms_per_step"] for row in rows.values()]
