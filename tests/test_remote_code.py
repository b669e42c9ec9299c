# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint folder serves programs that have never heard of gma_hf: evaluation harnesses, pipelines, servers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gma_hf
from gma_hf.remote_code import HOW_TO_INSTALL
from tests.conftest import make_model, tiny_config


def run_program(source: str, tmp_path: Path, hide_gma_hf: bool = False) -> subprocess.CompletedProcess:
    """Run Python source in a fresh process, which may be kept from finding gma_hf."""
    if hide_gma_hf:
        source = (
            "import importlib.abc, sys\n"
            "class Hide(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name.split('.')[0] == 'gma_hf':\n"
            "            raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
            "sys.meta_path.insert(0, Hide())\n"
        ) + source
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def checkpoint(tmp_path, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    model.save_pretrained(tmp_path / "model")
    torch.save((tokens, model(tokens).logits.detach()), tmp_path / "expected.pt")
    return tmp_path / "model"


LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
config = AutoConfig.from_pretrained({folder!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
tokens, expected = torch.load({expected!r})
assert type(model).__module__.startswith("gma_hf."), type(model)
assert torch.equal(model(tokens).logits, expected)
AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
AutoModelForSequenceClassification.from_pretrained({folder!r}, trust_remote_code=True)
model.save_pretrained({again!r})
print("same logits")
"""


@pytest.mark.quick
def test_a_program_that_never_imports_gma_hf_gets_the_same_logits(checkpoint, tmp_path):
    paths = {"folder": str(checkpoint), "expected": str(tmp_path / "expected.pt"), "again": str(tmp_path / "again")}
    result = run_program(LOAD.format(**paths), tmp_path)
    assert result.returncode == 0 and "same logits" in result.stdout, result.stderr
    # What such a program saves loads again
    assert torch.equal(
        gma_hf.GMAForCausalLM.from_pretrained(tmp_path / "again").lm_head.weight,
        gma_hf.GMAForCausalLM.from_pretrained(checkpoint).lm_head.weight,
    )


def test_without_gma_hf_the_error_says_to_install_it(checkpoint, tmp_path):
    source = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)"
    result = run_program(source, tmp_path, hide_gma_hf=True)
    assert result.returncode != 0
    assert f"This checkpoint needs the package gma_hf: {HOW_TO_INSTALL}." in result.stderr
    # A name that nobody of this project has registered
    assert "pip install gma_hf" not in result.stderr + (checkpoint / "gma_remote.py").read_text()


def test_an_error_inside_the_package_is_not_taken_for_a_missing_package(checkpoint, tmp_path):
    folder = str(checkpoint)
    source = f"import sys\nsys.modules['safetensors.torch'] = None\nexec(open({folder + '/gma_remote.py'!r}).read())"
    result = run_program(source, tmp_path)
    assert result.returncode != 0 and "needs the package" not in result.stderr


def test_without_trust_the_error_says_to_trust(checkpoint, tmp_path):
    source = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=False)"
    result = run_program(source, tmp_path)
    assert result.returncode != 0
    assert "trust_remote_code" in result.stderr


def test_import_is_light(tmp_path):
    """`import gma_hf` pulls in nothing that only some users need, beyond what Transformers' models import themselves
    (with Triton installed, PyTorch's compiler behind them imports it)."""
    heavy = ("triton", "matplotlib", "peft", "datasets", "gma_hf.ops.attention.triton", "gma_hf.analysis")
    source = (
        "import sys, transformers.modeling_utils\n"
        "before = set(sys.modules)\n"
        "import gma_hf\n"
        f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    result = run_program(source, tmp_path)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr
