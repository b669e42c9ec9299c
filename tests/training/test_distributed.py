# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Several processes: the same loss as one."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from gma_hf import GMAForCausalLM
from gma_hf.training import GMATrainingArguments

from ..conftest import tiny_config
from .conftest import SCRIPTS, command_line, logged, results


CONFIGS = SCRIPTS / "configs"


def launch(config, arguments, cache):
    """`accelerate launch` a language model run on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS.parent), environment.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
    ]
    done = subprocess.run(
        [*command, str(SCRIPTS / "train_clm.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("ddp_cpu", 1), ("fsdp2", 1), ("ddp_cpu", 2), ("fsdp2", 2)],
    ids=lambda x: x if isinstance(x, str) else f"context {x}",
)
def test_two_processes_have_the_loss_of_one(kind, shared, run_script, tiny_run, tmp_path):
    run = {**tiny_run, "mixture_learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2}
    run_script("train_clm", *command_line(run, per_device_train_batch_size=4, output_dir=tmp_path / "one"))
    config = yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text())
    # The shipped FSDP2 configuration is for GPUs and bfloat16
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True, "mixed_precision": "no"}))
    arguments = command_line(run, per_device_train_batch_size=2, output_dir=tmp_path / "two")
    arguments += ["--context_parallel_size", str(shared)]
    launch(tmp_path / "accelerate.yaml", arguments, cache=tmp_path / "cache")
    assert results(tmp_path / "two")["num_processes"] == 2
    # The same sums of float32 in another order, through four steps
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    assert logged(tmp_path / "two", "eval_loss") == pytest.approx(logged(tmp_path / "one", "eval_loss"), rel=1e-4)
    health = "mixture/usage_perplexity"
    if shared > 1:  # measured of the first part of each sequence
        assert len(logged(tmp_path / "two", health)) == len(logged(tmp_path / "one", health))
        return
    assert logged(tmp_path / "two", health) == pytest.approx(logged(tmp_path / "one", health), rel=1e-3)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the command is for machines without a GPU")
def test_the_documented_command_starts_one_training(tiny_run, tmp_path):
    """Word for word as the configuration's comment prints the command, with the arguments that it leaves open."""
    (line,) = re.findall(r"#\s+(accelerate launch --config_file .*) \.\.\.", (CONFIGS / "ddp_cpu.yaml").read_text())
    program, *words = shlex.split(line)
    assert program == "accelerate"
    run = {name: value for name, value in tiny_run.items() if name != "use_cpu"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, *command_line(run)],
        cwd=SCRIPTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "out")["num_processes"] == 2
    assert (done.stdout + done.stderr).count("eval metrics") == 1
    checkpoints = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-4/rng_state*"))
    assert checkpoints == ["rng_state_0.pth", "rng_state_1.pth"]


def test_a_process_that_is_alone_among_several_refuses(tmp_path, monkeypatch):
    """Two processes without a rank cannot find each other; each would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(ValueError, match="2 processes were started, but this one found no others"):
        GMATrainingArguments(str(tmp_path))


def test_the_fsdp2_configuration_shards_our_blocks():
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    names = {type(module).__name__ for module in GMAForCausalLM(tiny_config()).modules()}
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in names
