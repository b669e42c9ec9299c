# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""One runner for the rows of an experiment: one after the other, or side by side on one GPU and over all GPUs."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lib.results import Results


class Row(NamedTuple):
    """What measures a row, and the recipe that a stored row must have been measured by."""

    function: Callable[[], dict]
    recipe: dict | None = None


def add_run_options(add: Callable) -> None:
    add(
        "--per_gpu", type=int, default=1, metavar="N",
        help="rows side by side on every GPU, each in a process of its own; times of rows that share a GPU do not count",
    )  # fmt: skip
    add("--only", help=argparse.SUPPRESS)  # the one row that such a process measures


def run_rows(results: Results, rows: dict[str, Row], options: argparse.Namespace) -> None:
    """
    Measure the rows that the results do not hold yet. A row that needs another process is measured by the same command with
    `--only`; its file is merged when it has ended.

    Raises:
        SystemExit: the results hold a row by another recipe; or some row failed, then the others were measured and kept.
    """
    for name, row in rows.items():
        if row.recipe is not None and name in results.rows and results.rows[name]["recipe"] != row.recipe:
            sys.exit(
                f"error: {results.path} holds the row {name!r} with the recipe {results.rows[name]['recipe']}, not "
                f"{row.recipe}. Choose another --output."
            )
    missing = [options.only] if options.only else [name for name in rows if name not in results.rows]
    slots = [gpu for _ in range(options.per_gpu) for gpu in visible_gpus()]  # neighbours in time on different GPUs
    if options.only or len(slots) <= 1 or len(missing) <= 1:
        for name in missing:
            results.measure(name, rows[name].function)
        return
    threads = str(max(1, (os.cpu_count() or 1) // len(slots)))
    running: dict[str, tuple] = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        while missing or running:
            while missing and slots:
                name, gpu = missing.pop(0), slots.pop(0)
                part = Path(folder) / f"{len(results.rows)}-{len(missing)}.json"
                words = [sys.executable, *sys.argv, "--only", name, "--output", str(part)]
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads}
                with part.with_suffix(".log").open("w") as log:
                    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
                running[name] = (process, gpu, part, time.monotonic())
            for name, (process, gpu, part, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                slots.append(gpu)
                if process.returncode == 0:
                    results.add(name, {**json.loads(part.read_text())["rows"][name], "rows_per_gpu": options.per_gpu})
                    left = len(missing) + len(running)
                    print(f"{name}: {time.monotonic() - start:.0f} s; {left} to come", flush=True)
                else:
                    failed.append(name)
                    print(f"error: {name} failed:\n{part.with_suffix('.log').read_text()[-3000:]}", flush=True)
            time.sleep(0.2)
    if failed:
        sys.exit(f"error: these rows failed: {', '.join(failed)}")


def visible_gpus() -> list[str]:
    """The GPUs of this process by the names that CUDA_VISIBLE_DEVICES takes; without any, one place on the processor."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count] or [""]
