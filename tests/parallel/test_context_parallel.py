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


def errors_of(size: int, folder: Path, chosen: str = "") -> dict[str, str]:
    """From the names of the cases that failed to what the first process that failed says; all cases of a size in one start."""
    root = str(Path(gma_hf.__file__).parent.parent)
    names = [case.name for module in MODULES for case in module.CASES if chosen in case.name]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.parallel.running",
            str(size),
            ",".join(m.__name__ for m in MODULES),
            folder,
            chosen,
        ],
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"},
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    failed = {}
    for rank in range(size):
        told = json.loads((folder / f"{rank}.json").read_text())
        assert list(told) == names
        for name, error in told.items():
            if error is not None:
                failed.setdefault(name, f"process {rank}: {error}")
    return failed


# One test a size, not one a case: workers of pytest-xdist would each start the processes again
@pytest.mark.parametrize("size", [2, 4])
def test_parts_agree_with_the_whole(size, tmp_path):
    failed = errors_of(size, tmp_path)
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())
