"""What docs/parallel.md prints, run as it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parallel.md").read_text("utf-8")


def torchrun(arguments: list[str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_training_loop_of_the_page(tmp_path):
    (program,) = re.findall(r"```python\n(import torch\n.*?)```", PAGE, re.S)
    assert "torchrun --nproc_per_node=2 program.py" in PAGE
    (tmp_path / "program.py").write_text(program)
    losses = [
        [
            float(x)
            for x in re.findall(r"loss ([\d.]+)", torchrun([f"--nproc_per_node={size}", "program.py"], tmp_path))
        ]
        for size in (2, 1)
    ]
    assert len(losses[0]) == 3
    # Printed with four digits behind the point
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.parametrize("mode", ["context", "ddp"])
def test_the_benchmark_of_the_page(mode, tmp_path):
    (line,) = re.findall(r"torchrun (--nproc_per_node=4 benchmarks/parallel/scaling.py .*)", PAGE)
    options = shlex.split(line)
    options[0], options[1] = "--nproc_per_node=2", str(ROOT / options[1])
    output = tmp_path / "scaling.json"
    torchrun([*options, "--mode", mode, "--length", "37", "--rows", "2", "--small", "--output", str(output)], tmp_path)
    (row,) = json.loads(output.read_text())["rows"].values()
    assert row["mode"] == mode and row["processes"] == 2
    assert (row["sequence_bytes"] > 0) == (mode == "context")
