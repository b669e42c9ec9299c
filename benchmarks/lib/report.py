# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What the GPU benchmarks share: the device they need, and the JSON file that keeps their measurements."""

import argparse
import datetime
import gc
import json
import math
import platform
import re
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch


PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention")
RESULTS = Path(__file__).parents[1] / "results"


def device_name() -> str:
    """The GPU's name, or SystemExit on a machine without one."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "This benchmark needs an NVIDIA GPU, and torch.cuda.is_available() is False. "
            "benchmarks/kernels/attention_cpu.py measures the operator on a CPU."
        )
    return torch.cuda.get_device_name()


def default_output(stem: str) -> Path:
    """`results/<stem>_<model of the GPU>.json`: "NVIDIA H100 80GB HBM3" is h100."""
    words = re.split(r"[ -]", device_name())
    return RESULTS / f"{stem}_{next((word for word in words if re.search(r'[0-9]', word)), words[-1]).lower()}.json"


def versions() -> dict[str, str]:
    """Versions of what takes part in the measurement and is installed."""
    from gma_hf import __version__

    found = {"gma_hf": __version__, "python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a run goes on from an earlier one."""
    parser.add_argument("--output", type=Path, help="JSON file, by default one in results/ named after the GPU")
    parser.add_argument("--again", action="store_true", help="also measure what the output file holds already")


def command_line(script: str) -> str:
    """The command that was called, without where it wrote to."""
    words, arguments = [], iter(sys.argv[1:])
    for word in arguments:
        if word == "--output":
            next(arguments)
        elif not word.startswith("--output="):
            words.append(word)
    return shlex.join(["python", f"benchmarks/{script.replace('.', '/')}.py", *words])


def finite(x):
    """`x` with null for every number that JSON has no notation for."""
    if isinstance(x, dict):
        return {name: finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Report:
    """Rows of measurements in a JSON file, written after every row: a later run goes on where this one was stopped.

    Args:
        path: the file; what it holds is kept if it was measured in the same setting.
        script: name of the benchmark.
        setting: what all rows have in common.
        again: measure rows that the file holds already once more.
    """

    def __init__(self, path: Path, script: str, setting: dict, again: bool = False):
        self.path, self.again = path, again
        self.content = {
            "benchmark": script,
            "command": command_line(script),
            "date": datetime.date.today().isoformat(),
            "device": device_name(),
            "versions": versions(),
            "setting": finite(setting),
            "targets": [],
            "rows": [],
        }
        if path.exists():
            earlier = json.loads(path.read_text())
            for name in ("benchmark", "device", "versions", "setting"):
                if earlier[name] != self.content[name]:
                    raise SystemExit(
                        f"{path} holds results with {name} = {earlier[name]}, this run has {self.content[name]}; choose "
                        "another --output, or delete the file."
                    )
            self.content["rows"] = earlier["rows"]

    def rows(self, **key) -> list[dict]:
        """The rows that have these values."""
        return [row for row in self.content["rows"] if all(row.get(name) == value for name, value in key.items())]

    def get(self, field: str, **key) -> float | None:
        """One number of the first row with these values, or None if it was not measured."""
        return next((row[field] for row in self.rows(**key) if row.get(field) is not None), None)

    def wants(self, **key) -> bool:
        """Whether the row with this key is still to be measured."""
        return self.again or not self.rows(**key)

    def add(self, key: dict, values: dict) -> None:
        """Put a row in, in the place of an earlier one with the same key, write the file and print the row."""
        self.content["rows"] = [row for row in self.content["rows"] if row not in self.rows(**key)]
        self.content["rows"].append(finite({**key, **values}))
        self.write()
        shown = ", ".join(f"{name} {value}" if isinstance(value, int) else str(value) for name, value in key.items())
        print(f"  {shown}: " + ", ".join(f"{name} {describe(value)}" for name, value in values.items()), flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def print_targets(self, targets: list[tuple[str, float | None, str, float]]) -> None:
        """Print and keep the targets (what, measured, relation, limit) whose measurements there are."""
        self.content["targets"] = []
        print()
        for label, measured, relation, limit in targets:
            if measured is None:
                continue
            met = measured <= limit if relation == "<=" else measured >= limit
            target = f"{label} {relation} {limit:g}"
            print(f"target {target}: {measured:.3g} {'met' if met else 'MISSED'}")
            self.content["targets"].append(finite({"target": target, "measured": measured, "met": met}))
        self.write()
        print(f"{sum(target[1] is None for target in targets)} targets not measured; written to {self.path}")


def describe(value) -> str:
    """A number with as many digits as a reader needs."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, columns: list, rows: dict[str, list[str]]) -> None:
    """A table with one line per row name."""
    widths = [max(len(str(cell)) for cell in cells) + 2 for cells in zip(columns, *rows.values(), strict=True)]
    label = max(map(len, rows), default=0)
    print(f"\n{title}\n{'':<{label}}" + "".join(f"{column:>{n}}" for column, n in zip(columns, widths, strict=True)))
    for name, cells in rows.items():
        print(f"{name:<{label}}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True)))


def free_memory() -> None:
    """Give back what unreachable tensors held."""
    gc.collect()
    torch.cuda.empty_cache()


def median_time(function: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of `function` on the GPU, measured for `seconds` after half as long a warm-up.

    Inputs are evicted from the level 2 cache before every evaluation.
    """
    from triton.testing import do_bench

    return do_bench(function, warmup=500 * seconds, rep=1000 * seconds, return_mode="median")


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
