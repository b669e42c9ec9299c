# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The blocks of docs/ecosystem.md run as they stand: Python, and what the page gives to the command line."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


PAGE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
BLOCKS = [
    pytest.param(block, id=f"{section.splitlines()[0]}-{number}")
    for section in SECTIONS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
]
LIBRARIES = ("bitsandbytes", "lm_eval", "onnxruntime", "peft", "sentence_transformers", "torchao", "trl")


def test_no_library_of_the_page_is_missing_where_the_others_are():
    # The environment of the other tests has PEFT alone. In the environment of these tests, nothing may be skipped
    libraries = ("onnxscript", *(name for name in LIBRARIES if name != "peft"))
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if len(missing) == len(libraries):
        pytest.skip("the libraries of docs/ecosystem.md are not installed; make test-ecosystem installs them")
    assert missing == []


def run_block(block: str) -> dict:
    names = {"__name__": "page"}
    exec(compile(block, "a block of docs/ecosystem.md", "exec"), names)
    return names


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs_as_it_stands(block, demo_model):
    for library in LIBRARIES:
        if re.search(rf"^(import|from) {library}\b", block, flags=re.MULTILINE):
            pytest.importorskip(library, reason=f"this block of docs/ecosystem.md needs {library}")
    if "torch.onnx" in block:
        pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
    run_block(block)


@pytest.mark.timeout(1500)  # the command reads the descriptions of all tasks of the harness, some ten thousand files
def test_the_command_of_the_page_measures_what_the_python_of_the_page_measures(demo_model, tmp_path):
    pytest.importorskip("lm_eval", reason="the section on lm-evaluation-harness needs lm_eval")
    section = next(section for section in SECTIONS if section.startswith("lm-evaluation-harness"))
    python, task, command = (
        re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[0] for language in ("python", "yaml", "bash")
    )
    expected = run_block(python)["results"]["held_out"]["byte_perplexity,none"]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "held_out.yaml").write_text(task)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # The command prints four digits
    assert f"{expected:.4f}" in done.stdout
