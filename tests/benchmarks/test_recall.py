# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The recall tasks can be solved, ask only for what was read before, and count right answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.quality import recall
from benchmarks.quality.recall_report import best_rows, tables
from benchmarks.quality.tasks.recall import (
    FIRST_HAY,
    FIRST_VALUE,
    IGNORE_INDEX,
    Stream,
    draw_recall,
    multi_query_recall,
    needle,
)
from benchmarks.rivals.mixers import make_config, make_model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.quick
@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (256, 64), (34, 3)])
def test_every_question_has_been_answered_before(length, pairs):
    """Whoever remembers the pairs answers everything: the label behind a key is the value that stood behind it."""
    tokens, labels = multi_query_recall(8, length, pairs, seeded())
    for row, expected in zip(tokens.tolist(), labels.tolist(), strict=True):
        memory = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(memory) == len(set(memory.values())) == pairs
        labelled = [i for i, label in enumerate(expected) if label != IGNORE_INDEX]
        assert len(labelled) == pairs and min(labelled) > 2 * pairs
        # A label is that of the next token: the key stands before it
        assert sorted(row[i - 1] for i in labelled) == sorted(memory)
        assert all(memory[row[i - 1]] == expected[i] for i in labelled)


@pytest.mark.quick
def test_questions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        multi_query_recall(1, 64, 17, seeded())
    with pytest.raises(ValueError, match="do not fit"):
        needle(1, 14, seeded(), facts=4)


def test_gaps_follow_the_power_law():
    """With 8 of 24 slots chosen by a law of nearly 1/i, the first slot is chosen far more often than the last."""
    _, labels = multi_query_recall(2000, 64, 8, seeded(), vocab_size=64)
    asked = (labels != IGNORE_INDEX).float().mean(dim=0)[17::2]
    assert asked[0] > 0.9 and asked[-1] < 0.35
    # Uniform: a third each, with a standard error of 1.1%
    _, labels = multi_query_recall(2000, 64, 8, seeded(), vocab_size=64, power=1.0)
    asked = (labels != IGNORE_INDEX).float().mean(dim=0)[17::2]
    assert (asked - 1 / 3).abs().max() < 0.055


@pytest.mark.quick
@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_the_needle_is_in_the_haystack(depth):
    facts, length = 3, 100
    tokens, labels = needle(6, length, seeded(), facts, depth)
    assert tokens.shape == labels.shape == (6, length)
    for row, expected in zip(tokens.tolist(), labels.tolist(), strict=True):
        asked = facts if depth is None else 1
        keys = [i for i, token in enumerate(row) if token < FIRST_VALUE]  # facts first, then questions
        places, questions = keys[:facts], keys[facts:]
        memory = {row[i]: row[i + 1] for i in places}
        assert len(memory) == facts and questions == list(range(length - 2 * asked, length, 2))
        assert [i for i, label in enumerate(expected) if label != IGNORE_INDEX] == [i + 1 for i in questions]
        assert all(expected[i + 1] == memory[row[i]] for i in questions)
        assert all(FIRST_VALUE <= value < FIRST_HAY for value in memory.values())
        if depth is not None:
            needle_at = next(i for i in places if row[i] == row[questions[0]])
            # Facts stand in slots of two tokens
            assert abs(needle_at - depth * (questions[0] - 2)) <= 2


def test_streams_repeat_and_differ_by_seed():
    def batches(seed: int) -> list[torch.Tensor]:
        stream = iter(Stream(lambda generator: draw_recall(generator, [(32, 2), (64, 4)], 256), seed))
        return [next(stream)["input_ids"] for _ in range(4)]

    first, again, other = batches(0), batches(0), batches(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(batch.numel() == 256 for batch in first)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.quick
def test_contenders_are_read_or_refused():
    contender = recall.Contender.parse("gma_gated:4:1,3")
    assert (contender.layers, contender.softmax_layers, contender.components) == (4, (1, 3), 64)
    assert contender.overrides()["layer_types"] == ["linear_attention", "full_attention"] * 2
    assert recall.Contender.parse("gma_gated:2::256").components == 256
    assert recall.Contender.parse("softmax").layers == 2
    for text in ("gru", "softmax:two", "softmax:2:1", "gma_gated:2:2", "gma_gated:2:1:64:3"):
        with pytest.raises(ValueError, match="is no contender"):
            recall.Contender.parse(text)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["softmax:2", "elu:2", "mamba2:2", "gma_gated:4:1,3"])
def test_the_loss_is_that_of_the_language_model(name):
    """The head on the labelled positions alone gives the loss that the model itself computes from the labels."""
    contender = recall.Contender.parse(name)
    config = make_config(
        contender.mixer,
        hidden_size=32,
        num_hidden_layers=contender.layers,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=64,
        max_position_embeddings=32,
        **contender.overrides(),
    )
    torch.manual_seed(0)
    model = make_model(contender.mixer, config).eval()
    tokens, labels = multi_query_recall(3, 32, 4, seeded(), vocab_size=64)
    with torch.no_grad():
        logits, expected = recall.answers(model, tokens, labels)
        loss = torch.nn.functional.cross_entropy(logits, expected)
        whole = model(tokens, labels=labels, use_cache=False).loss
        # Both round the same logits, in float32
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
        right = (logits.argmax(dim=-1) == expected).float().mean().item()
    assert recall.recalled(model, tokens, labels) == pytest.approx(right)


def test_rows_are_written_kept_and_shown(tmp_path, monkeypatch, capsys):
    """The script on a toy size; then the tables and figures without measuring again."""
    output = tmp_path / "recall.json"
    options = ["--contenders", "softmax:2", "gma_gated:2:1", "--steps", "2", "--widths", "64", "--output", str(output)]
    options += ["--tokens_per_step", "256", "--test_rows", "8", "--lengths", "64", "128", "--train_lengths", "64"]
    options += ["--depths", "2", "--experiments", "needle", "--seeds", "0", "--rates", "1e-3"]

    def call(*extra: str) -> str:
        monkeypatch.setattr(sys, "argv", ["recall.py", *options, *extra])
        recall.main()
        return capsys.readouterr().out

    shown = call()
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2
    for row in rows.values():
        assert [cell[:2] for cell in row["accuracy"]] == [[64, 0.0], [64, 1.0], [128, 0.0], [128, 1.0]]
    sizes = [row["parameters"] for row in rows.values()]
    assert max(sizes) <= 1.03 * min(sizes)
    assert "hybrid: GMA, gated block, 1 softmax of 2 layers" in shown
    call("--plot")
    assert (tmp_path / "needle.png").exists()
    figure = recall.plot(rows)["needle"]
    shown = [[text.get_text() for text in axis.texts] for axis in figure.axes if axis.get_visible()]
    # A map a contender: depth by depth, the accuracy at every length
    expected = [sorted(row["accuracy"], key=lambda cell: (cell[1], cell[0])) for row in rows.values()]
    assert shown == [[f"{100 * accuracy:.0f}" for _, _, accuracy in cells] for cells in expected]
    assert json.loads(output.read_text())["rows"] == rows


@pytest.mark.quick
def test_tables_show_the_best_learning_rate_and_the_most_pairs():
    def row(rate: float, seed: int, accuracies: list[float]) -> dict:
        return {
            "recipe": {"experiment": "recall", "width": 64, "learning_rate": rate},
            "title": "some mixer, 2 layers",
            "parameters": 1_000_000,
            "state_size": 4096,
            "seed": seed,
            "accuracy": [[64, 4, accuracies[0]], [256, 64, accuracies[1]]],
        }

    rows = {
        "a": row(1e-3, 0, [0.5, 0.1]),
        "b": row(1e-2, 0, [1.0, 0.2]),
        "c": row(1e-2, 1, [0.9, 0.4]),
    }
    best = best_rows(rows.values(), "recall")[64, "some mixer, 2 layers"]
    assert best["accuracy"] == pytest.approx({(64, 4): 0.95, (256, 64): 0.3}) and best["seeds"] == 2
    assert "| 64 | some mixer, 2 layers | 1.00 M | 4,096 | 4,096 | 2 x 2 | 95.0 (90.0) | 30.0 (20.0) | 4 |" in tables(
        rows
    )


def test_rows_side_by_side_are_the_rows_of_one_after_the_other(tmp_path):
    """Two processes at a time, as on one GPU: the same rows, each trained by the same command."""
    root = Path(recall.__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "quality" / "recall.py"), "--experiments", "recall"]
    command += ["--contenders", "softmax:1", "linear_gated:1", "--steps", "2", "--widths", "64", "--seeds", "0"]
    command += ["--rates", "1e-3", "--tokens_per_step", "256", "--test_rows", "1", "--workers", "0"]
    found = []
    for places in ("1", "2"):
        output = tmp_path / f"{places}.json"
        subprocess.run([*command, "--output", str(output), "--per_gpu", places], check=True, capture_output=True)
        found.append(json.loads(output.read_text())["rows"])
    assert sorted(found[0]) == sorted(found[1]) and len(found[0]) == 2
    for name, row in found[0].items():
        for field in ("accuracy", "losses", "parameters", "recipe", "command", "state_per_layer"):
            assert found[1][name][field] == row[field], field
        assert found[1][name]["rows_per_gpu"] == 2
