# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The language-modelling experiment counts every token once, and its numbers are those of the model."""

import itertools
import json
import lzma
import math
import random
import sys

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.quality import language_modeling
from benchmarks.quality.language_modeling import (
    LANGUAGE_MIXERS,
    evaluate,
    extrapolate,
    main,
    repeated_pairs,
    token_nll,
    wanted_rows,
)
from benchmarks.quality.language_modeling_report import plot, table
from benchmarks.quality.tasks.language_modeling import detokenize, load, prepare, tokenizer_folder, windows
from benchmarks.rivals.mixers import MIXERS, make_config, make_model


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_components": 4,
    "max_position_embeddings": 16,
}
PUBLISHED = ' \n = Homarus gammarus = \n \n The lobster ( 24 in ) is red @-@ brown , says " he " ; it \'s 3 @.@ 5 m , or 1 @,@ 000 mm . \n'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as the experiment reads it, with made-up text."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    (folder / "wikipedia-long").mkdir()
    for split, count in (("train", 60), ("valid", 5)):
        with lzma.open(folder / "wikipedia-long" / f"{split}.jsonl.xz", "wt", encoding="utf-8") as file:
            for _ in range(count):
                file.write(json.dumps({"text": " ".join(draw.choices(words, k=60))}) + "\n")
    (folder / "wikitext-103").mkdir()
    for split in ("valid", "test"):
        with lzma.open(folder / "wikitext-103" / f"{split}.txt.xz", "wt", encoding="utf-8") as file:
            file.write(8 * PUBLISHED)
    return folder


@pytest.fixture(scope="module")
def prepared_file(data):
    path = data / "lm.pt.xz"
    prepare(data, path, vocab_size=300)
    return path


def tiny_model(mixer="gma_gated", **overrides):
    torch.manual_seed(0)
    return make_model(mixer, make_config(mixer, **{**SIZES, **overrides})).eval()


@pytest.mark.quick
def test_wikitext_is_written_as_one_would_write_it():
    assert detokenize(PUBLISHED).strip() == (
        '= Homarus gammarus =\n\nThe lobster (24 in) is red-brown, says "he"; it\'s 3.5 m, or 1,000 mm.'
    )


@pytest.mark.quick
@pytest.mark.parametrize("number", [2, 16, 17, 18, 33, 50])
def test_windows_predict_every_token_but_the_first_once(number):
    whole, rest = windows(torch.arange(number), 16)
    predicted = torch.cat([whole[:, 1:].flatten(), rest[1:]])
    assert predicted.tolist() == list(range(1, number))
    # Each sees the token before it
    assert torch.equal(whole[:, :-1] + 1, whole[:, 1:])


def test_prepared_text_is_the_text(data, prepared_file):
    prepared = load(prepared_file)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(prepared_file))
    decoded = tokenizer.decode(prepared["tokens"]["wikitext_test"])
    assert decoded == tokenizer.eos_token + 8 * PUBLISHED
    with lzma.open(data / "wikipedia-long" / "train.jsonl.xz", "rt") as file:
        documents = {json.loads(line)["text"] for line in file}
    assert set(tokenizer.decode(prepared["tokens"]["train"]).split(tokenizer.eos_token)[1:]) == documents
    assert prepared["counts"]["test"] == {"words": len(PUBLISHED.split()) * 8, "lines": PUBLISHED.count("\n") * 8}
    assert prepared["vocab_size"] == len(tokenizer)


def test_likelihood_is_that_of_the_model():
    model, tokens = tiny_model(), torch.randint(40, (40,))
    whole, rest = token_nll(model, tokens, 16, batch_tokens=16)
    with torch.no_grad():
        losses = [model(tokens[None, i : i + 17], labels=tokens[None, i : i + 17]).loss.item() for i in (0, 16, 32)]
    expected = [whole[0].mean().item(), whole[1].mean().item(), rest.mean().item()]
    # Means of float32
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(prepared_file):
    prepared = load(prepared_file)
    model = tiny_model(vocab_size=prepared["vocab_size"])
    model.lm_head.weight.data.zero_()
    row = evaluate(model, prepared, 16)
    size, counts = prepared["vocab_size"], prepared["counts"]["test"]
    predicted = len(prepared["tokens"]["wikitext_test"]) - 1
    assert row["wikipedia_valid_perplexity"] == pytest.approx(size, rel=1e-5)
    assert row["wikitext_test_perplexity_interval"] == pytest.approx([size, size], rel=1e-5)
    number = counts["words"] + counts["lines"]
    assert math.log(row["wikitext_test_word_perplexity"]) == pytest.approx(math.log(size) * predicted / number)
    detokenized = len(prepared["tokens"]["wikitext_test_detokenized"]) - 1
    # Another form of the text, the same words
    assert math.log(row["wikitext_test_detokenized_word_perplexity"]) == pytest.approx(
        math.log(size) * detokenized / number
    )


def test_learned_positions_cannot_be_exceeded():
    tokens = torch.randint(40, (200,))
    assert extrapolate(tiny_model("gma_paper"), tokens, 16)["extrapolation"] is None
    assert len(extrapolate(tiny_model("softmax"), tokens, 16)["extrapolation"]) == 16


def options(**values):
    sizes = {"mixers": [], "contexts": [], "components": [], "seeds": [], "rates": []}
    return type("Options", (), {"rows": None, **sizes, **values})


def test_rows_by_name_and_as_a_product():
    assert wanted_rows(options(rows=["elu:1024", "gma_gated:4096:128", "mamba2:1024:64:2", "elu:16:4:0:2e-3"])) == {
        "elu:1024:64:0": ("elu", 1024, 64, 0, 1e-3),
        "gma_gated:4096:128:0": ("gma_gated", 4096, 128, 0, 1e-3),
        "mamba2:1024:64:2": ("mamba2", 1024, 64, 2, 1e-3),
        "elu:16:4:0:0.002": ("elu", 16, 4, 0, 2e-3),
    }
    sizes = {"mixers": ["elu", "softmax"], "contexts": [16, 32], "components": [4], "seeds": [0, 1]}
    assert len(wanted_rows(options(**sizes, rates=[1e-3, 2e-3]))) == 16
    for text in ("rwkv:1024", "linformer:1024"):
        with pytest.raises(SystemExit, match="no mixer"):
            wanted_rows(options(rows=[text]))


@pytest.mark.quick
def test_repeated_pairs_are_those_that_the_window_has_shown():
    torch.manual_seed(0)
    windows_ = torch.randint(4, (5, 31))
    found = repeated_pairs(windows_)
    for row, marks in zip(windows_.tolist(), found.tolist(), strict=True):
        seen = set()
        for pair, mark in zip(itertools.pairwise(row), marks, strict=True):
            assert mark == (pair in seen)
            seen.add(pair)


@pytest.fixture
def run(prepared_file, tmp_path, monkeypatch):
    """Runs the script with tiny sizes; returns what it wrote."""

    def run(name, *words):
        output = tmp_path / name
        sizes = "--contexts 32 --components 4 --steps 2 --hidden_size 32 --layers 1 --heads 2 --tokens_per_step 128"
        command = f"language_modeling.py --prepared {prepared_file} --output {output} {sizes}".split()
        monkeypatch.setattr(sys, "argv", [*command, *words])
        main()
        return json.loads(output.read_text())

    return run


def test_every_mixer_is_trained_and_no_row_twice(run, tmp_path, monkeypatch, capsys):
    report = run("results.json")
    assert len(report["rows"]) == len(LANGUAGE_MIXERS)
    for row in report["rows"].values():
        # After two steps a model knows next to nothing: all tokens of the vocabulary are alike, in the test as at first
        for loss in (row["losses"][0][1], math.log(row["wikitext_test_detokenized_perplexity"])):
            assert loss == pytest.approx(math.log(300), rel=0.1)
    sizes = [row["parameters"] for row in report["rows"].values()]
    assert max(sizes) < 1.03 * min(sizes)
    shown = capsys.readouterr().out
    assert table(report) in shown
    assert all(MIXERS[name].title in shown for name in LANGUAGE_MIXERS)
    assert "repeated pairs" in shown and "{'" not in shown

    monkeypatch.setattr(language_modeling, "measure", lambda *args: pytest.fail("a row was trained again"))
    assert run("results.json") == report
    run("results.json", "--plot")
    assert (tmp_path / "language_modeling.png").exists()
    curves, bars = plot(report).axes
    best = sorted(report["rows"].values(), key=lambda row: row["wikitext_test_detokenized_word_perplexity"])
    assert [bar.get_width() for bar in bars.patches] == [
        row["wikitext_test_detokenized_word_perplexity"] for row in best
    ]
    assert [list(line.get_ydata()) for line in curves.lines] == [
        [y for _, y in row["validation_curve"]] for row in best
    ]


def test_accumulated_gradients_are_those_of_the_whole_step(run):
    whole, parts = (
        run(f"{name}.json", "--rows", "softmax:32:4", "--micro_tokens", tokens)["rows"]["softmax:32:4:0"]
        for name, tokens in (("whole", "128"), ("parts", "32"))
    )
    # The same tokens in the same step: rounding of float32, and the four decimals that are kept
    for name in ("losses", "validation_curve"):
        for own, expected in zip(parts[name], whole[name], strict=True):
            assert own == pytest.approx(expected, rel=1e-4)
