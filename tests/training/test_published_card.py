# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A published card has prose from a person and numbers from measurements, with honest intervals."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from gma_hf import GMAConfig
from gma_hf.training import GMATrainingArguments, TrainingInputError
from gma_hf.training.arguments import (
    LanguageModelingArguments,
    ModelArguments,
    parse_arguments,
    parse_config_overrides,
)
from gma_hf.training.cards.published_card import (
    Energy,
    energy_estimate,
    results_of_row,
    write_published_card,
)
from gma_hf.training.intervals import bootstrap_perplexity

from .conftest import command_line, results


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
DESCRIPTION = {
    "title": "GMA, a toy",
    "summary": "A toy.",
    "intended_use": "Tests.",
    "training_data": "Sentences about a river, CC BY-SA 4.0.",
    "limits": "Knows nothing.",
    "datasets": ["Salesforce/wikitext"],
    "evaluation_data": {"held-out": {"type": "Salesforce/wikitext", "name": "WikiText-103", "split": "test"}},
    "energy": {"power_watts": 700, "grams_co2_per_kwh": 400, "source": "the board's limit; a world average."},
}
RESULTS = {
    "num_parameters": 1234,
    "device": "CPU",
    "num_processes": 2,
    "metrics": {"train_runtime": 1800.0},
    "evaluations": {
        "held-out": {
            "perplexity": 20.0,
            "perplexity_interval": [18.5, 21.5],
            "word_perplexity": 40.0,
            "word_perplexity_interval": [36.0, 44.0],
            "num_tokens": 1000,
            "num_words": 800,
            "num_windows": 10,
            "block_size": 128,
        }
    },
}


@pytest.fixture
def card_folder(tmp_path):
    folder = tmp_path / "gma-toy"
    folder.mkdir()
    (folder / "card.yaml").write_text(yaml.safe_dump(DESCRIPTION))
    (folder / "recipe.yaml").write_text("preset: gated\nlearning_rate: 1.0e-3\n")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


@pytest.mark.quick
def test_the_card_tells_all_and_its_metadata_can_be_read_by_the_hub(card_folder):
    card = ModelCard.load(write_published_card(card_folder))
    assert card.data.license == "apache-2.0" and card.data.datasets == ["Salesforce/wikitext"]
    found = {(result.metric_type, result.dataset_name, result.metric_value) for result in card.data.eval_results}
    assert found == {("perplexity", "WikiText-103", 20.0), ("word_perplexity", "WikiText-103", 40.0)}
    for text in (
        "CC BY-SA 4.0",
        "Knows nothing.",
        "| held-out | perplexity | 20.00 | 18.50 to 21.50 |",
        "learning_rate: 1.0e-3",
        'AutoModelForCausalLM.from_pretrained("gma-toy")',
        "trust_remote_code=True",
        "@article{huang2026gaussian",
        "1,234",
    ):
        assert text in card.text, text


@pytest.mark.quick
def test_energy_is_said_to_be_an_estimate():
    # Two devices for half an hour at 700 W: 0.7 kWh, 280 g
    text = energy_estimate(Energy(700, 400, "the board's limit."), RESULTS)
    assert "1 device hours" in text and "0.7 kWh" in text and "2.8e+02 g" in text
    assert "Energy and carbon are estimates and were not measured" in text and "the board's limit." in text
    assert energy_estimate(Energy(700, 400, ""), {}) is None


@pytest.mark.quick
def test_a_row_of_a_benchmark_makes_a_card(card_folder):
    row = {
        "parameters": 77,
        "train_seconds": 36.0,
        "context": 1024,
        "losses": [[1, 2.0]],
        "wikitext_test_perplexity": 30.0,
        "wikitext_test_perplexity_interval": [29.0, 31.0],
        "wikitext_test_word_perplexity": 50.0,
        "wikitext_test_word_perplexity_interval": [48.0, 52.0],
        "wikitext_test_word_perplexity_without_line_ends": 55.0,
        **{
            "command": "python benchmarks/quality/language_modeling.py",
            "date": "2026-11-22",
            "device": "toy",
            "versions": {},
        },
    }
    made = results_of_row({"setting": {"steps": 840}, "rows": {"gma": row}}, "gma")
    assert set(made["evaluations"]) == {"wikitext_test"}
    assert made["details"] == {"steps": 840, "context": 1024}
    (card_folder / "results.json").write_text(json.dumps(made))
    labelled = {**DESCRIPTION, "evaluation_data": {"wikitext_test": {"name": "WikiText-103", "label": "the test set"}}}
    (card_folder / "card.yaml").write_text(yaml.safe_dump(labelled))
    text = write_published_card(card_folder).read_text()
    assert "| the test set | perplexity per word | 50.00 | 48.00 to 52.00 |" in text
    assert "0.01 device hours (toy)" in text
    with pytest.raises(TrainingInputError, match="the file has gma"):
        results_of_row({"setting": {}, "rows": {"gma": row}}, "softmax")


def test_a_card_without_measurements_is_not_written(card_folder):
    (card_folder / "results.json").unlink()
    with pytest.raises(TrainingInputError, match="without measurements"):
        write_published_card(card_folder)
    assert not (card_folder / "README.md").exists()


def test_results_that_the_hub_would_merge_are_refused(card_folder):
    scores = RESULTS["evaluations"]["held-out"]
    results = {**RESULTS, "evaluations": {"held-out": scores, "tokenised": scores}}
    (card_folder / "results.json").write_text(json.dumps(results))
    write_published_card(card_folder)  # one that is not described is a configuration of its own

    same = DESCRIPTION["evaluation_data"]["held-out"] | {"name": "WikiText-103, tokenised"}
    description = {**DESCRIPTION, "evaluation_data": {**DESCRIPTION["evaluation_data"], "tokenised": same}}
    (card_folder / "card.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(TrainingInputError, match=r"tokenised.*the same type, config and split"):
        write_published_card(card_folder)


def test_wrong_descriptions_are_refused_by_name(card_folder):
    for change, match in (
        ({"colour": "red"}, "colour"),
        ({"summary": None, "drop": "summary"}, "summary"),
        ({"language": "English"}, "ISO 639"),
    ):
        values = {**DESCRIPTION, **change}
        values.pop(values.pop("drop", None), None)
        (card_folder / "card.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(TrainingInputError, match=match):
            write_published_card(card_folder)
    (card_folder / "card.yaml").unlink()
    with pytest.raises(TrainingInputError, match="intended_use"):
        write_published_card(card_folder)


@pytest.mark.quick
def test_the_interval_covers_the_true_perplexity_as_often_as_it_says():
    draw = np.random.default_rng(0)
    counts = np.full(200, 100.0)
    hits = 0
    for seed in range(100):
        # Windows of an article share its difficulty: groups of 4 move together
        loss = 3.0 + 0.3 * draw.standard_normal(50).repeat(4) + 0.1 * draw.standard_normal(200)
        low, high = bootstrap_perplexity(loss * counts, counts, num_samples=300, seed=seed)
        hits += low <= math.exp(3.0) <= high
    # 95 expected; a bootstrap of 25 runs of 8 is some points short of it, and 100 trials scatter by 2.2
    assert 84 <= hits <= 99


def test_the_interval_shrinks_with_the_text_and_needs_two_windows():
    draw = np.random.default_rng(1)

    def width(num_windows):
        nll = 100 * (3 + 0.3 * draw.standard_normal(num_windows))
        low, high = bootstrap_perplexity(nll, np.full(num_windows, 100.0))
        return math.log(high / low)

    # By the square root of 100, up to the noise of the smaller sample
    assert 5 < width(50) / width(5000) < 20
    low, high = bootstrap_perplexity(np.full(30, 300.0), np.full(30, 100.0))
    assert low == pytest.approx(math.exp(3)) and high == pytest.approx(math.exp(3))
    with pytest.raises(ValueError, match="two windows"):
        bootstrap_perplexity(np.ones(1), np.ones(1))


def test_measured_perplexity_is_that_of_the_training_script(run_script, tiny_run, tmp_path, card_folder):
    out = tiny_run["output_dir"]
    test = tmp_path / "test.txt"
    test.write_text("the river runs past old mills and quiet farms.\n" * 20)
    run_script("train_clm", *command_line(tiny_run, test_file=test))
    (card_folder / "results.json").unlink()  # those of another model are not overwritten
    words = [card_folder, "--model", out, "--evaluate", f"river={test}", "--block_size", 32, "--device", "cpu"]
    run_script("write_model_card", *words)
    measured, trained = results(card_folder), results(out)
    scores = measured["evaluations"]["river"]
    # float32 sums in batches of another size
    assert scores["perplexity"] == pytest.approx(trained["metrics"]["test_perplexity"], rel=1e-5)
    assert scores["word_perplexity"] == pytest.approx(trained["metrics"]["test_word_perplexity"], rel=1e-4)
    assert scores["num_tokens"] == trained["metrics"]["test_num_tokens"]
    assert scores["perplexity_interval"][0] < scores["perplexity"] < scores["perplexity_interval"][1]
    assert measured["hyperparameters"] == trained["hyperparameters"]
    assert (card_folder / "config.json").is_file()
    assert f"| river | perplexity | {scores['perplexity']:.2f} |" in (card_folder / "README.md").read_text()


def test_the_script_says_what_is_wrong(run_script, card_folder, tmp_path):
    for words, match in (
        ([tmp_path / "nowhere"], "no folder"),
        ([card_folder, "--evaluate", "a=b"], "--model"),
        ([card_folder, "--model", tmp_path], "config.json"),
        ([card_folder, "--model", tmp_path, "--row", "a"], "belong together"),
        ([card_folder, "--model", tmp_path, "--evaluate", "text.txt"], "NAME=FILE"),
    ):
        with pytest.raises(SystemExit, match=match):
            run_script("write_model_card", *words)


@pytest.mark.quick
@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in MODEL_CARDS.glob("*/card.yaml")), ids=lambda p: p.name
)
def test_committed_cards_are_what_their_files_say(folder, tmp_path):
    """Also before there are results: then the description alone must make a card that the hub would take."""
    shutil.copytree(folder, tmp_path / folder.name)
    written = folder / "README.md"
    if not (folder / "results.json").exists():
        assert not written.exists()
        (tmp_path / folder.name / "results.json").write_text(json.dumps(RESULTS))
    made = write_published_card(tmp_path / folder.name)
    if written.exists():
        assert made.read_text() == written.read_text()


@pytest.mark.quick
@pytest.mark.parametrize("recipe", sorted(MODEL_CARDS.glob("*/recipe.yaml")), ids=lambda p: p.parent.name)
def test_recipes_are_arguments_of_the_training_script(recipe, tmp_path):
    model_args, _, args = parse_arguments(
        [ModelArguments, LanguageModelingArguments, GMATrainingArguments],
        [str(recipe), "--train_file", "train.txt", "--output_dir", str(tmp_path), "--use_cpu"],
    )
    overrides = parse_config_overrides(model_args.config_overrides)
    config = GMAConfig.from_preset(model_args.preset, vocab_size=model_args.tokenizer_vocab_size, **overrides)
    assert config.max_position_embeddings >= 1024 and args.max_steps == -1
