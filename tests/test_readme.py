# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The README tells the truth: its Python runs, and what it names exists."""

import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the trained model of the repository, where the examples may write."""
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("index", range(len(PYTHON_BLOCKS)))
def test_python_blocks_run_as_they_stand(index, clone):
    exec(compile(PYTHON_BLOCKS[index], f"README.md, Python block {index + 1}", "exec"), {"__name__": "readme"})


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
