# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The analysis of the trained language model: from a folder and a text to numbers, a table and a figure, and to no text."""

import itertools
import json
import lzma
import re
import sys

import pytest
import torch

from benchmarks.quality import responsibilities
from benchmarks.quality.responsibilities import largest_nmi, main
from benchmarks.quality.responsibilities_report import ROLES, escaped, plot, table
from benchmarks.quality.tasks.language_modeling import detokenize
from gma_hf import GMAForCausalLM
from gma_hf.analysis import normalized_mutual_information
from gma_hf.training import train_tokenizer
from tests.conftest import make_model, tiny_config


PUBLISHED = 30 * ' \n = Homarus = \n \n The lobster ( 24 in ) is red @-@ brown , says " he " | it \'s 3 @.@ 5 m . \n'
LAYERS, HEADS, COMPONENTS = 2, 4, 6
HEAD_VALUES = {
    "usage_perplexity": (1, COMPONENTS),
    "dead_components": (0, COMPONENTS),
    "entropy": (0, 2),
    "nmi": (0, 1),
    "nmi_largest": (0, 1),
    "purity": (0, 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data, and a tiny model with its tokenizer in `model`."""
    folder = tmp_path_factory.mktemp("responsibilities")
    (folder / "wikitext-103").mkdir()
    with lzma.open(folder / "wikitext-103" / "test.txt.xz", "wt", encoding="utf-8") as file:
        file.write(PUBLISHED)
    tokenizer = train_tokenizer([detokenize(PUBLISHED)], 300)
    tokenizer.save_pretrained(folder / "model")
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_components": COMPONENTS}
    config = tiny_config("gated", vocab_size=len(tokenizer), **sizes)
    make_model(GMAForCausalLM, config).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Runs the script, by default on the tiny model; returns what it wrote."""

    def run(*words, model=folder / "model"):
        output = tmp_path / "results.json"
        command = f"responsibilities.py {model} --data {folder} --output {output} --block_size 32"
        monkeypatch.setattr(sys, "argv", [*command.split(), *words])
        main()
        return json.loads(output.read_text(encoding="utf-8"))

    return run


@pytest.mark.quick
def test_a_model_is_analysed_trained_and_untrained_and_nothing_twice(run, monkeypatch, capsys):
    report = run("--max_tokens", "200")
    assert list(report["rows"]) == ["trained", "untrained"]
    for row in report["rows"].values():
        assert row["num_tokens"] == sum(row["categories"].values()) == 200
        assert [layer["layer"] for layer in row["layers"]] == ["0", "1"]
        for layer in row["layers"]:
            for role in ROLES:
                for name, (low, high) in HEAD_VALUES.items():
                    assert len(layer[role][name]) == HEADS
                    # The fourth decimal is rounded
                    assert all(low <= value <= high + 1e-4 for value in layer[role][name])
        assert {"command", "date", "device", "versions"} <= set(row)
    assert report["rows"]["trained"]["layers"] != report["rows"]["untrained"]["layers"]
    assert table(report) in capsys.readouterr().out

    monkeypatch.setattr(responsibilities, "measure", lambda *args: pytest.fail("a row was measured again"))
    assert run("--max_tokens", "200") == report
    with pytest.raises(SystemExit, match="another setting"):
        run("--max_tokens", "100")


def test_results_hold_single_tokens_of_the_text_and_no_more(run):
    content = json.dumps(run("--max_tokens", "200"), ensure_ascii=False)
    words = [word for word in detokenize(PUBLISHED).split() if len(word) > 2]
    # Reports write a dot for the space before a word
    pairs = itertools.pairwise(words)
    assert not [pair for pair in pairs if re.search(r"[ \u00b7]+".join(map(re.escape, pair)), content)]


@pytest.mark.quick
def test_components_that_know_the_category_have_the_largest_possible_nmi():
    # Of 5 components, 2 share the first category and 3 the second
    counts = torch.tensor([[[4, 0], [6, 0], [0, 3], [0, 1], [0, 2]]])
    torch.testing.assert_close(largest_nmi(counts), normalized_mutual_information(counts))
    # Moving a token into a component of the other category loses some of it
    counts[0, 0] = torch.tensor([3, 1])
    assert normalized_mutual_information(counts) < largest_nmi(counts)


@pytest.mark.quick
def test_a_token_stays_in_its_cell():
    assert escaped("|") == "&#124;" and escaped("<b>") == "&#60;b&#62;"
    assert escaped("\u00b7the") == "\u00b7the"


def test_what_is_missing_is_named(run, folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"error: .*test\.txt\.xz"):
        run("--data", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["responsibilities.py", str(folder / "model")])
    with pytest.raises(SystemExit):
        main()
    assert "--data" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["responsibilities.py", "--table", "--output", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="does not exist"):
        main()


def test_hybrids_and_grouped_heads_have_a_table_and_a_figure_too(run, folder, tmp_path):
    vocab_size = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    config = tiny_config("hybrid", vocab_size=vocab_size, num_key_value_heads=2)
    make_model(GMAForCausalLM, config).save_pretrained(tmp_path / "hybrid")
    for file in (folder / "model").glob("tokenizer*"):
        (tmp_path / "hybrid" / file.name).write_bytes(file.read_bytes())
    report = run("--max_tokens", "64", "--plot", model=tmp_path / "hybrid")
    assert [layer["layer"] for layer in report["rows"]["trained"]["layers"]] == ["0", "2"]
    assert "| 2 | queries |" in table(report)
    assert (tmp_path / "responsibilities.png").exists()
    # A mark a head, at the number of components that it uses, and the alignment of the same heads beside it
    for axis, name in zip(plot(report).axes, ("usage_perplexity", "nmi"), strict=True):
        marks = [line for line in axis.lines if line.get_linestyle() == "None"]
        layers = report["rows"]["trained"]["layers"]
        expected = [layer[role][name] for role in ("keys", "queries") for layer in layers]
        assert [list(line.get_ydata()) for line in marks] == expected
