# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The first minutes: what `make demo` runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gma_hf.commands import demo as commands_demo


ROOT = Path(__file__).resolve().parent.parent


def demo(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def expect_the_rest(result: subprocess.CompletedProcess, folder: Path, text_name: str):
    """Text, the model from a fresh process, and the report."""
    assert result.returncode == 0, result.stderr[-2000:]
    assert "GMAForCausalLM from a fresh process: logits identical" in result.stdout
    assert (folder / "report.html").stat().st_size > 10_000
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["text"]["name"] == text_name and report["text"]["num_tokens"] > 500


def test_the_demo_loads_the_trained_model_writes_reloads_and_reports(tmp_path):
    result = demo("--output_dir", str(tmp_path))
    expect_the_rest(result, tmp_path, "README.md")
    assert "7,239,600 parameters" in result.stdout
    written = result.stdout.split("2. It writes")[1].split("3. Where")[0]
    assert all(len(written.split(prompt)[1].split()) > 15 for prompt in ("The history of the village", "In 1912, the"))
    assert not (tmp_path / "model.safetensors").exists()


def test_the_demo_trains_writes_reloads_and_reports(tmp_path):
    result = demo("--train", "--max_steps", "2", "--output_dir", str(tmp_path))
    expect_the_rest(result, tmp_path, "held-out source files")
    assert "effective components per head" in result.stdout
    assert (tmp_path / "model.safetensors").exists()


def test_without_the_weights_the_demo_says_so_and_trains(tmp_path, monkeypatch, capsys):
    """As where the package was installed without the repository."""
    trained = []

    class Trained(Exception):
        pass

    def train(folder, max_steps):
        trained.append((folder, max_steps))
        raise Trained

    monkeypatch.setattr(commands_demo, "PRETRAINED", tmp_path / "nowhere")
    monkeypatch.setattr(commands_demo, "train_small_model", train)
    with pytest.raises(Trained):
        commands_demo.main(["--output_dir", str(tmp_path / "out")])
    assert trained == [(tmp_path / "out", commands_demo.MAX_STEPS)]
    assert "The trained model is in clones of the repository only, so the demo trains" in capsys.readouterr().out


def test_steps_without_training_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--max_steps is for the training of the demo\. Add --train"):
        commands_demo.main(["--max_steps", "2", "--output_dir", str(tmp_path / "out")])


def test_the_demo_overwrites_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = demo("--output_dir", str(tmp_path))
    assert result.returncode == 1 and "holds something that the demo did not write" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
