"""Processes that share every sequence compute what one process computes: two and four of them, started once for all cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gma_hf

from . import converted_cases, native_cases


MODULES = (native_cases, converted_cases)
NAMES = [case.name for module in MODULES for case in module.CASES]


@pytest.fixture(scope="module", params=[2, 4], ids=["two processes", "four processes"])
def told(request, tmp_path_factory):
    """What each process said of each case: `None`, or the error."""
    folder = tmp_path_factory.mktemp(f"processes-{request.param}")
    root = str(Path(gma_hf.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.parallel.running",
            str(request.param),
            ",".join(m.__name__ for m in MODULES),
            folder,
        ],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=root,
    )
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]
    assert done.returncode == 0, done.stderr[-3000:]
    return told


@pytest.mark.parametrize("name", NAMES)
def test_parts_agree_with_the_whole(name, told):
    for rank, of_rank in enumerate(told):
        assert of_rank[name] is None, f"process {rank}: {of_rank[name]}"
