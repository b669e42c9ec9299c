# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The first minutes: what `make demo` runs."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_trains_writes_reloads_and_plots(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--max_steps", "2", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "GMAForCausalLM from a fresh process: logits identical" in result.stdout
    assert "effective components per head" in result.stdout
    assert (tmp_path / "components.png").stat().st_size > 10_000
    assert (tmp_path / "model.safetensors").exists()


def test_the_demo_overwrites_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--max_steps", "2", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 1 and "holds something that the demo did not write" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
