"""Training with shared sequences: what goes wrong is said. That it trains like one process: `tests/training/test_distributed.py`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import gma_hf
from gma_hf.training import GMATrainer, GMATrainingArguments
from gma_hf.training.context import context_of, expect_supported
from tests.conftest import make_model, tiny_config


PROGRAM = """
import os, sys
import torch
from transformers import TrainerCallback
from gma_hf import GMAForCausalLM
from gma_hf.training import GMATrainer, GMATrainingArguments
from tests.conftest import tiny_config


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1":
            os._exit(9)


rows = torch.randint(3, 99, (16, 21), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in rows]
args = GMATrainingArguments(
    sys.argv[1], context_parallel_size=2, per_device_train_batch_size=1, max_steps=8, save_steps=2, report_to="none", use_cpu=True,
    disable_tqdm=True,
)
torch.manual_seed(0)
GMATrainer(GMAForCausalLM(tiny_config()), args, train_dataset=data, callbacks=[Dies()]).train()
"""


def test_a_process_that_dies_stops_the_others_and_leaves_a_whole_checkpoint(tmp_path):
    root = str(Path(gma_hf.__file__).parent.parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": root}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out")]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 9, errors[1]
    assert processes[0].returncode not in (0, None)
    assert "Another process has stopped or does not answer" in errors[0], errors[0]
    assert f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}" in errors[0], errors[0]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    gma_hf.GMAForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")


@pytest.mark.quick
def test_processes_that_do_not_fit_the_mesh_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="`context_parallel_size` is 2, which does not divide the 1 processes"):
        GMATrainingArguments(str(tmp_path), context_parallel_size=2, use_cpu=True)
    with pytest.raises(ValueError, match="`context_parallel_size` must be at least 1, got 0"):
        GMATrainingArguments(str(tmp_path), context_parallel_size=0, use_cpu=True)
    with pytest.raises(ValueError, match="6 processes cannot be cut into groups of `context_parallel_size` = 4"):
        context_of(6, 4, "cpu")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(options, reason, tmp_path):
    trainer = GMATrainer(
        make_model(gma_hf.GMAForCausalLM, tiny_config()),
        GMATrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options),
    )
    with pytest.raises(ValueError, match=f"`context_parallel_size` does not go together with .*{reason}"):
        expect_supported(trainer)


@pytest.mark.quick
def test_a_context_needs_processes():
    with pytest.raises(ValueError, match="Start the program with `torchrun"), gma_hf.context_parallel():
        pass
