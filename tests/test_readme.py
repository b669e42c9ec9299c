# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The README tells the truth: its Python runs, its numbers are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
import yaml

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


def committed(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_tables_are_the_committed_results():
    from benchmarks.kernels.attention_cpu import markdown_table
    from benchmarks.kernels.attention_gpu import summary as gpu_attention
    from benchmarks.quality.language_modeling_report import summary

    assert summary(committed("language_modeling")) in README
    assert gpu_attention(committed("gpu_attention_h200")) in README
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert markdown_table(committed("cpu_attention")["rows"]) in page


def best_of_rates(row: dict, cells: tuple[str, ...]) -> list[str]:
    """The means over seeds at the rate that is best at the first cell."""

    def mean(cell: str, rate: float) -> float:
        values = [x for x, (used, _) in zip(row["accuracy"][cell], row["models"], strict=True) if used == rate]
        return sum(values) / len(values)

    best = max({rate for rate, _ in row["models"]}, key=lambda rate: mean(cells[0], rate))
    return [f"{mean(cell, best):.1f} %" for cell in cells]


def test_recall_is_the_mean_of_the_best_rate_that_was_measured():
    rows = committed("block_search")["rows"]
    for shown, row in {
        "GMA, correlated": "recall, correlated, 3000 steps",
        "Mamba-2-like": "recall, mamba2_like head_eps 1e-12, 3000 steps",
        "linear attention, q and k of unit length": "recall, linear tie True head_eps 0.0001, 3000 steps",
        "GMA, gated": "recall, gated, 3000 steps",
    }.items():
        assert f"| {shown} | {' | '.join(best_of_rates(rows[row], ('64@256', '128@512')))} |" in README, shown


def test_no_run_of_the_readme_ends_while_it_warms_up():
    commands = re.findall(r"gma-hf train-\S+ (\S+\.yaml)((?:.*\\\n)*.*)", README)
    assert len(commands) >= 3
    for config, options in commands:
        warm_up = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))["warmup_steps"]
        steps = re.search(r"--max_steps (\d+)", options)
        # Below 1, a share of the steps of the run
        share = warm_up if warm_up < 1 else warm_up / int(steps.group(1)) if steps else None
        assert share is not None and share <= 0.2, config


def test_files_that_the_readme_names_exist():
    for path in set(re.findall(r"(?:scripts|benchmarks|gma_hf)/[\w/]+\.(?:py|yaml)", README)):
        assert (ROOT / path).exists(), path
