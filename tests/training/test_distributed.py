# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Several processes: the same loss as one."""

import os
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from gma_hf import GMAForCausalLM

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


@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp2"])
def test_two_processes_have_the_loss_of_one(kind, run_script, tiny_run, tmp_path):
    run = {**tiny_run, "mixture_learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2}
    run_script("train_clm", *command_line(run, per_device_train_batch_size=4, output_dir=tmp_path / "one"))
    config = yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text())
    # The shipped FSDP2 configuration is for GPUs and bfloat16
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True, "mixed_precision": "no"}))
    arguments = command_line(run, per_device_train_batch_size=2, output_dir=tmp_path / "two")
    launch(tmp_path / "accelerate.yaml", arguments, cache=tmp_path / "cache")
    assert results(tmp_path / "two")["num_processes"] == 2
    # The same sums of float32 in another order, through four steps
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    assert logged(tmp_path / "two", "eval_loss") == pytest.approx(logged(tmp_path / "one", "eval_loss"), rel=1e-4)
    health = "mixture/usage_perplexity"
    assert logged(tmp_path / "two", health) == pytest.approx(logged(tmp_path / "one", health), rel=1e-3)


def test_the_fsdp2_configuration_shards_our_blocks():
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    names = {type(module).__name__ for module in GMAForCausalLM(tiny_config()).modules()}
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in names
