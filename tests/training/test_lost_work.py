# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""No command destroys what a folder holds, and no command does its work twice."""

import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import gma_hf
from gma_hf.training import GMATrainer, TrainingInputError, find_last_checkpoint
from gma_hf.training.checkpoints import checkpoint_to_resume
from tests.conftest import make_model, tiny_config
from tests.conversion.test_conversion_scripts import conversion, distillation, save_source  # noqa: F401 (fixtures)

from .conftest import SCRIPTS, command_line, logged, results


def contents(folder):
    """Names and hashes of everything in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def interrupt(monkeypatch):
    """Press Ctrl-C in the training step after so many."""

    def press(after):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == after:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        step = GMATrainer.training_step
        monkeypatch.setattr(GMATrainer, "training_step", training_step)
        return lambda: monkeypatch.setattr(GMATrainer, "training_step", step)

    return press


@pytest.fixture
def commands(tiny_run, labelled, conversion, distillation, tmp_path):  # noqa: F811
    """Every command that writes a folder, with arguments of a tiny run; a function of the folder."""
    classes = {**tiny_run, "train_file": str(labelled("train")), "max_length": 40}
    classes.pop("block_size")
    native = tmp_path / "native"
    save_source(native)
    make_model(gma_hf.GMAForCausalLM, tiny_config(vocab_size=300)).save_pretrained(native)
    (tmp_path / "text.txt").write_text("the river runs past old mills and quiet farms.\n" * 30)
    source = save_source(tmp_path / "source")
    return {
        "train_clm": lambda out: command_line(tiny_run, output_dir=out),
        "train_mlm": lambda out: command_line(tiny_run, output_dir=out),
        "train_classification": lambda out: command_line(classes, output_dir=out),
        "convert_attention": lambda out: [source, *command_line(conversion, output_dir=out, device="cpu")],
        "distill": lambda out: [source, *command_line(distillation, output_dir=out)],
        "analyze_responsibilities": lambda out: [
            native,
            *command_line({"text": tmp_path / "text.txt", "output": out, "device": "cpu", "num_shuffles": 2}),
        ],
    }


NAMES = ["train_clm", "train_mlm", "train_classification", "convert_attention", "distill", "analyze_responsibilities"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_holds_something_else_is_refused_and_stays(run_script, commands, tmp_path, name):
    out = tmp_path / "kept"
    make_model(gma_hf.GMAForCausalLM, tiny_config()).save_pretrained(out)
    before = contents(out)
    with pytest.raises(SystemExit, match=r"kept already holds something.*Choose another folder"):
        run_script(name, *commands[name](out))
    assert contents(out) == before


@pytest.mark.parametrize("name", NAMES)
def test_an_output_path_that_is_a_file_is_named(run_script, commands, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match=r"file is a file\. Give a folder"):
            run_script(name, *commands[name](out))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_says_so_and_does_nothing(run_script, commands, tmp_path, name, caplog):
    out = tmp_path / "done"
    run_script(name, *commands[name](out))
    before = contents(out)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gma_hf"):
        run_script(name, *commands[name](out))
    assert "This run is finished" in caplog.text
    assert contents(out) == before
    assert not list(tmp_path.glob(".done*"))  # nothing temporary is left


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 16}, "--block_size was 32, and is 16"),
        ({"learning_rate": 1e-2}, "--learning_rate was 0.001, and is 0.01"),
        ({"max_steps": 6}, "--max_steps was 4, and is 6"),
        ({"train_file": "another.txt"}, r"--train_file was corpus.txt of [\d,]+ bytes .*, and is another.txt"),
        ({"test_file": "another.txt"}, "--test_file was not given, and is another.txt"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_options_or_data_are_refused_by_name(
    run_script, tiny_run, tmp_path, interrupt, changes, message, is_finished
):
    out = tmp_path / "out"
    if is_finished:
        run_script("train_clm", *command_line(tiny_run))
    else:
        interrupt(after=3)
        with pytest.raises(SystemExit):
            run_script("train_clm", *command_line(tiny_run))
    (tmp_path / "another.txt").write_text("quiet farms and old mills run past the river.\n" * 300)
    changes = {name: tmp_path / value if name.endswith("file") else value for name, value in changes.items()}
    before = contents(out)
    with pytest.raises(SystemExit, match=f"out holds another run: .*{message}"):
        run_script("train_clm", *command_line(tiny_run, **changes))
    assert contents(out) == before


def test_the_same_text_under_another_name_of_its_folder_is_the_same_run(run_script, tiny_run, tmp_path, caplog):
    run_script("train_clm", *command_line(tiny_run))
    (tmp_path / "moved").mkdir()
    shutil.copy(tiny_run["train_file"], tmp_path / "moved")
    with caplog.at_level(logging.INFO, logger="gma_hf"):
        run_script("train_clm", *command_line(tiny_run, train_file=tmp_path / "moved" / "corpus.txt", logging_steps=2))
    assert "This run is finished" in caplog.text


def test_after_ctrl_c_the_same_command_goes_on_as_if_nothing_had_happened(
    run_script, tiny_run, tmp_path, interrupt, capsys
):
    run = {**tiny_run, "max_steps": 6, "save_steps": 2}
    run_script("train_clm", *command_line(run, output_dir=tmp_path / "whole"))
    release = interrupt(after=5)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_script("train_clm", *command_line(run))
    assert stopped.value.code == 130
    shown = capsys.readouterr().err
    assert f"The same command goes on from {tmp_path / 'out' / 'checkpoint-4'}" in shown
    assert "Traceback" not in shown
    release()
    run_script("train_clm", *command_line(run))
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_folder_may_be_a_link(run_script, commands, tmp_path, name):
    """With spaces and letters of other languages in the name of the folder. A link to nothing is refused."""
    target, link = tmp_path / "große Platte" / "Modell é", tmp_path / "mein Ordner"
    link.symlink_to(target, target_is_directory=True)
    with pytest.raises(SystemExit, match=r"is a link to .*Modell é, which does not exist"):
        run_script(name, *commands[name](link))
    assert not target.parent.exists()
    target.mkdir(parents=True)
    run_script(name, *commands[name](link))
    assert link.is_symlink() and json.loads((target / "run.json").read_text())["finished"]
    before = contents(target)
    run_script(name, *commands[name](link))
    assert contents(target) == before and len(before) > 2
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"],
)
def test_a_truncated_checkpoint_falls_back_to_the_one_before(run_script, tiny_run, tmp_path, interrupt, caplog, file):
    run = {**tiny_run, "max_steps": 6, "save_steps": 2}
    run_script("train_clm", *command_line(run, output_dir=tmp_path / "whole"))
    release = interrupt(after=5)
    with pytest.raises(SystemExit):
        run_script("train_clm", *command_line(run))
    release()
    damaged = tmp_path / "out" / "checkpoint-4" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    assert find_last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    with caplog.at_level(logging.INFO, logger="gma_hf"):
        run_script("train_clm", *command_line(run))
    assert f"checkpoint-4 is damaged ({file} cannot be read)" in caplog.text
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")


def test_without_the_optimizer_a_run_does_not_go_on(run_script, tiny_run, tmp_path, interrupt):
    release = interrupt(after=3)
    with pytest.raises(SystemExit):
        run_script("train_clm", *command_line(tiny_run))
    release()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    for asked in ({}, {"resume_from_checkpoint": checkpoint}):
        with pytest.raises(SystemExit, match=r"has no optimizer\.pt.*--model_name_or_path .*checkpoint-2"):
            run_script("train_clm", *command_line(tiny_run, **asked))


def test_a_checkpoint_of_another_run_is_refused_by_name(run_script, tiny_run, tmp_path):
    run_script("train_clm", *command_line(tiny_run))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    changes = {"output_dir": tmp_path / "next", "resume_from_checkpoint": checkpoint, "block_size": 16}
    with pytest.raises(SystemExit, match=r"checkpoint-2' belongs to another run: --block_size was 32, and is 16"):
        run_script("train_clm", *command_line(tiny_run, **changes))
    assert not (tmp_path / "next").exists()


def test_only_damaged_checkpoints_start_anew(tmp_path, caplog):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{")
    assert checkpoint_to_resume(tmp_path) is None
    assert "checkpoint-2 is damaged" in caplog.text


@pytest.mark.parametrize("changes", [{"block_size": 100_000}, {"config_overrides": "hidden_size=33"}])
def test_a_command_that_fails_before_its_work_leaves_no_folder(run_script, tiny_run, tmp_path, changes):
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="error: "):
        run_script("train_clm", *command_line(tiny_run, **changes))
    assert set(tmp_path.iterdir()) == before
    run_script("train_clm", *command_line(tiny_run))  # put right, in the same folder


def test_a_conversion_that_fails_leaves_no_folder(run_script, conversion, tmp_path, monkeypatch):  # noqa: F811
    source = save_source(tmp_path / "source")
    before = set(tmp_path.iterdir())

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gma_hf.commands.convert.write_conversion_card", fail)
    with pytest.raises(SystemExit, match="error: cannot write: No space left on device"):
        run_script("convert_attention", source, *command_line(conversion, device="cpu"))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("limit", [20_000, 150_000])
def test_a_disk_that_is_full_leaves_nothing_half_written(tiny_run, tmp_path, limit):
    """A limit on the size of files, reached in the tokenizer or in the optimizer's state, stands for the full disk."""
    program = f"import runpy, sys; runpy.run_path({str(SCRIPTS / 'train_clm.py')!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program, *command_line(tiny_run, dataloader_num_workers=0)],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "error: cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    out = tmp_path / "out"
    assert not list(out.rglob("*.safetensors")) and not list(out.glob("checkpoint-*"))
    assert not list(tmp_path.glob(".out*"))


def test_distillation_with_other_options_is_refused_by_name(run_script, distillation, tmp_path):  # noqa: F811
    source = save_source(tmp_path / "source")
    run_script("distill", source, *command_line(distillation))
    before = contents(tmp_path / "out")
    for changes, message in (
        ({"transfer_learning_rate": 1e-1}, "--transfer_learning_rate was 0.005, and is 0.1"),
        ({"num_components": 4}, "--num_components was 8, and is 4"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_script("distill", source, *command_line({**distillation, **changes}))
    other = save_source(tmp_path / "other", "llama")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(SystemExit, match=r"--model_name_or_path was config\.json"):
        run_script("distill", other, *command_line(distillation))
    assert contents(tmp_path / "out") == before


def test_a_distillation_that_was_interrupted_goes_on(run_script, distillation, tmp_path, interrupt, capsys):  # noqa: F811
    source = save_source(tmp_path / "source")
    run = {**distillation, "save_strategy": "steps", "save_steps": 1, "sample_tokens": 0}
    run_script("distill", source, *command_line(run, output_dir=tmp_path / "whole"))
    release = interrupt(after=2)
    with pytest.raises(SystemExit) as stopped:
        run_script("distill", source, *command_line(run))
    assert stopped.value.code == 130 and "The same command goes on" in capsys.readouterr().err
    release()
    run_script("distill", source, *command_line(run))
    whole, resumed = (results(tmp_path / name)["evaluations"] for name in ("whole", "out"))
    assert whole["after distillation"]["eval_kl"] == pytest.approx(resumed["after distillation"]["eval_kl"], rel=1e-5)


def test_a_card_loses_neither_prose_nor_measurements(run_script, tiny_run, tmp_path):
    run_script("train_clm", *command_line(tiny_run))
    card = tmp_path / "card"
    card.mkdir()
    (card / "card.yaml").write_text(
        "title: A toy\nsummary: A toy.\nintended_use: Tests.\ntraining_data: Sentences.\nlimits: Knows nothing.\n"
    )
    (tmp_path / "text.txt").write_text("the river runs past old mills and quiet farms.\n" * 30)

    def measure(name, model=tiny_run["output_dir"]):
        words = [
            "--model",
            model,
            "--evaluate",
            f"{name}={tmp_path / 'text.txt'}",
            "--block_size",
            32,
            "--device",
            "cpu",
        ]
        run_script("write_model_card", card, *words)

    measure("first")
    measure("second")
    assert set(results(card)["evaluations"]) == {"first", "second"}
    before = contents(card)
    other = tmp_path / "other"
    run_script("train_clm", *command_line(tiny_run, output_dir=other, seed=1))
    with pytest.raises(SystemExit, match="holds results of another model"):
        measure("third", other)
    assert contents(card) == before
    (card / "README.md").write_text("# Written by hand\n")
    before = contents(card)
    with pytest.raises(SystemExit, match="was not made by this command"):
        measure("third")
    assert contents(card) == before


def test_a_saved_model_replaces_an_older_one_file_by_file(tmp_path):
    """What lies in the folder beside the model stays, and no temporary file does."""
    model = make_model(gma_hf.GMAForCausalLM, tiny_config())
    (tmp_path / "notes.txt").write_text("mine")
    arguments = gma_hf.training.GMATrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    GMATrainer(model, arguments).save_model()
    assert {"notes.txt", "config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_errors_of_folders_are_value_errors():
    assert issubclass(TrainingInputError, ValueError)
