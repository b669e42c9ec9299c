# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What is wrong with the input is said in one line, by name, and as a ValueError."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers

import gma_hf
import gma_hf_command
from gma_hf.commands.running import refused_by_file_system
from gma_hf.training import GMATrainingArguments, TrainingInputError
from gma_hf.training.arguments import ClassificationArguments
from gma_hf.training.text.data import load_labelled_splits
from tests.conftest import tiny_config

from .conftest import SCRIPTS, command_line


pytestmark = pytest.mark.quick
VERBS = [verb for verb in gma_hf_command.VERBS if verb != "demo"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1e-3}, r"`learning_rate` must not be negative, got -0\.001"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number, got nan"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"weight_decay": -0.1}, "`weight_decay` must not be negative"),
        ({"max_steps": 0}, "nothing to train"),
        ({"num_train_epochs": 0}, "nothing to train"),
    ],
)
def test_impossible_training_arguments(run_script, tiny_run, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        GMATrainingArguments(str(tmp_path), use_cpu=True, **values)
    run = {name: value for name, value in tiny_run.items() if name != "max_steps" or "num_train_epochs" not in values}
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run_script("train_clm", *command_line(run, **values))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("distill", ["--transfer_steps=-3"], "--transfer_steps must not be negative, got -3"),
        ("distill", ["--lora_rank=-1"], "--lora_rank must not be negative"),
        ("convert_attention", ["--seed=-1"], "--seed must not be negative, got -1"),
        ("analyze_responsibilities", ["--batch_size=0"], "--batch_size must be at least 1, got 0"),
        ("analyze_responsibilities", ["--max_tokens=-1"], "--max_tokens must not be negative, got -1"),
    ],
)
def test_impossible_numbers_of_other_commands(run_script, corpus, tmp_path, script, words, message):
    text = (
        ["--text", corpus]
        if script.startswith("analyze")
        else ["--train_file", corpus, "--output_dir", tmp_path / "out"]
    )
    with pytest.raises(SystemExit, match=message):
        run_script(script, "no/such_model", *text, *words)


@pytest.mark.parametrize("verb", VERBS)
def test_a_misspelt_option_is_named_before_what_it_should_have_given(verb, capsys):
    """With nothing else on the command line: neither "no training data" nor "required" may hide the typo."""
    option = {"card": "block_size", "publish": "repo_id", "analyze": "text"}.get(verb, "train_file")
    with pytest.raises(SystemExit, match=rf"error: There is no argument --{option}s\. Did you mean --{option}\?"):
        gma_hf_command.main([verb, f"--{option}s", "1"])


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_required_is_named_without_a_page_of_usage(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        gma_hf_command.main([verb])
    message = str(stopped.value)
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    assert any(word in message for word in ("--train_file", "required"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_on_a_screen_and_the_rest_is_a_word_away(verb, capsys):
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            gma_hf_command.main([verb, word])
        assert stopped.value.code == 0
        shown[word] = capsys.readouterr().out
    assert shown["--help"].startswith(f"usage: gma-hf {verb}")
    assert len(shown["--help"].splitlines()) <= 50
    if verb.startswith("train"):
        assert "--help-all shows" in shown["--help"]
        assert "--weight_decay" in shown["--help-all"] and "--weight_decay" not in shown["--help"]


def test_the_overview_answers_without_loading_pytorch():
    program = (
        "import sys, gma_hf_command; gma_hf_command.main(['--help'])\n"
        "assert not {'torch', 'transformers', 'gma_hf'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {verb} " in done.stdout for verb in gma_hf_command.VERBS)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_misspelt_verb_is_answered_with_the_closest():
    with pytest.raises(SystemExit, match=r"no verb 'train_clm'\. Did you mean train-clm"):
        gma_hf_command.main(["train_clm"])


def test_labels_that_are_lists_are_refused_by_name(tmp_path):
    rows = [{"text": f"word {index}", "label": ["a", "b"]} for index in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        TrainingInputError, match=r"'label' of the train data holds .*not one class a row.*--label_column"
    ):
        load_labelled_splits(ClassificationArguments(train_file=[str(tmp_path / "rows.jsonl")]), seed=0)


def test_a_full_disk_is_recognised_also_inside_the_errors_of_libraries():
    assert "No space left" in refused_by_file_system(OSError(28, "No space left on device"))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(28, "No space left on device", "model.safetensors")
    assert "model.safetensors: No space left" in refused_by_file_system(wrapped)
    assert refused_by_file_system(RuntimeError("I/O error: File too large (os error 27)")) is not None
    assert refused_by_file_system(RuntimeError("shapes do not fit")) is None
    assert refused_by_file_system(FileNotFoundError(2, "No such file")) is None


@pytest.mark.parametrize(
    ("block", "has_maximum"), [("gated", False), ("windowed", False), ("hybrid", True), ("paper-rope", True)]
)
def test_only_models_with_positions_warn_of_their_maximum_length(block, has_maximum, caplog):
    model = gma_hf.GMAForCausalLM(tiny_config(block, max_position_embeddings=8)).eval()
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    transformers.utils.logging.warning_once.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            tokens = torch.tensor([[3, 4, 5]])
            generated = model.generate(tokens, max_new_tokens=9, do_sample=False, eos_token_id=None)
            # Beyond the maximum the texts go on as the model says
            logits = model(generated[:, :-1], use_cache=False).logits[:, 2:]
            assert torch.equal(generated[:, 3:], logits.argmax(dim=-1)) and generated.shape == (1, 12)
    finally:
        logger.propagate = before
    assert ("predefined maximum length (8)" in caplog.text) == has_maximum
