# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The README tells the truth: its Python runs, its numbers are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

import gma_hf
from gma_hf.training import train_tokenizer
from tests.conftest import tiny_config


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def demo_model(tmp_path, monkeypatch):
    """A stand-in for what `make demo` leaves behind: a model and its tokenizer in outputs/demo."""
    tokenizer = train_tokenizer(["import os\n" * 20, "def read_lines(path):\n"], 300)
    model = gma_hf.GMAForCausalLM(tiny_config("gated", vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "outputs" / "demo")
    tokenizer.save_pretrained(tmp_path / "outputs" / "demo")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("index", range(len(PYTHON_BLOCKS)))
def test_python_blocks_run_as_they_stand(index, demo_model):
    exec(compile(PYTHON_BLOCKS[index], f"README.md, Python block {index + 1}", "exec"), {"__name__": "readme"})


def test_tables_are_the_committed_results():
    from benchmarks.kernels.attention_cpu import markdown_table
    from benchmarks.kernels.attention_gpu import summary as gpu_attention
    from benchmarks.quality.language_modeling_report import summary
    from benchmarks.quality.long_context_classification import summary as classification_summary

    results = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("language_modeling", "long_context_classification", "cpu_attention", "gpu_attention_h100")
    }
    assert summary(results["language_modeling"]) in README
    assert classification_summary(results["long_context_classification"]["rows"]) in README
    assert markdown_table(results["cpu_attention"]["rows"]) in README
    assert gpu_attention(results["gpu_attention_h100"]) in README


def test_files_that_the_readme_names_exist():
    for path in set(re.findall(r"(?:scripts|benchmarks|gma_hf)/[\w/]+\.(?:py|yaml)", README)):
        assert (ROOT / path).exists(), path
