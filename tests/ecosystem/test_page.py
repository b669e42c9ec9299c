# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The Python blocks of docs/ecosystem.md run as they stand."""

import re
from pathlib import Path

import pytest


PAGE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs_as_it_stands(index, tmp_path, monkeypatch):
    for library in sorted(set(re.findall(r"^import (onnx\w+)", BLOCKS[index], flags=re.MULTILINE))):
        pytest.importorskip(library, reason=f"this block of docs/ecosystem.md needs {library}")
    if "torch.onnx" in BLOCKS[index]:
        pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[index], f"docs/ecosystem.md, Python block {index + 1}", "exec"), {"__name__": "page"})
