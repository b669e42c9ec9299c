# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes that share the projections of a model compute what one computes."""

import os
import subprocess
import sys

import gma_hf
from tests.conftest import BLOCKS, make_model, tiny_config


PROGRAM = """
import sys
from pathlib import Path
import gma_hf, torch
from transformers import AutoModelForCausalLM

tokens = torch.randint(3, 99, (2, 19), generator=torch.Generator().manual_seed(1))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    single = AutoModelForCausalLM.from_pretrained(folder)
    for name in ("q_proj", "o_proj"):
        weight = getattr(model.model.layers[0].self_attn, name).weight
        assert weight.to_local().numel() * 2 == weight.numel(), (folder.name, name)
    outputs, expected = (one(tokens, labels=tokens, use_cache=False) for one in (model, single))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=2e-5)
    outputs.loss.backward()
    expected.loss.backward()
    for name, parameter in single.named_parameters():
        gradient = model.get_parameter(name).grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        scale = parameter.grad.abs().max()
        assert (gradient - parameter.grad).abs().max() <= 1e-4 * scale + 1e-6, (folder.name, name)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens, **arguments), single.generate(tokens, **arguments))
    print("agrees:", folder.name)
"""


def test_two_processes_agree_with_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for block in BLOCKS:
        # 100 words, so that the head divides among the processes too
        model = make_model(gma_hf.GMAForCausalLM, tiny_config(block, vocab_size=100))
        model.save_pretrained(tmp_path / "models" / block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = os.path.dirname(os.path.dirname(gma_hf.__file__))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*command, str(program), str(tmp_path / "models")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("agrees:") == 2 * len(BLOCKS), result.stdout
