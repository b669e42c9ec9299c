# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The results of a benchmark: one JSON file, written after every row, which a later run goes on with."""

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from gma_hf import __version__


ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "mamba-ssm")
NOT_OF_THE_COMMAND = ("--output", "--only", "--per_gpu")  # options with one value that change no number


def add_output_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--output` and `--table`; no benchmark writes to `benchmarks/results` unless `--output` says so.

    Args:
        parser (`argparse.ArgumentParser`): the parser of a benchmark.
        name (`str`): the name of its results without `.json`; a `*` stands for the device.
    """
    parser.set_defaults(results_name=name)
    parser.add_argument(
        "--output",
        type=Path,
        help=f"JSON file for the rows; rows that it holds are not measured again. Default: {name.replace('*', 'DEVICE')}.json "
        "in the current folder. The committed results are in benchmarks/results",
    )
    parser.add_argument(
        "--renew", action="store_true", help="measure everything again, in the place of what --output holds"
    )
    parser.add_argument(
        "--table", action="store_true", help="only print the tables: of --output, or of the committed results"
    )


def output_path(options: argparse.Namespace) -> Path:
    """The file that a run writes; with `--renew` it is empty at first."""
    path = options.output or Path(options.results_name.replace("*", short_device_name()) + ".json")
    if options.renew:
        path.unlink(missing_ok=True)
    return path


def stored(options: argparse.Namespace) -> list[Path]:
    """The files whose tables `--table` prints.

    Raises:
        SystemExit: there are none.
    """
    files = [options.output] if options.output else sorted(COMMITTED.glob(f"{options.results_name}.json"))
    files = [path for path in files if path.is_file()]
    if not files:
        sys.exit(
            f"error: {options.output or COMMITTED / options.results_name} does not exist: nothing was measured yet."
        )
    return files


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The name of the GPU, or of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def short_device_name() -> str:
    """ "NVIDIA H100 80GB HBM3" is h100."""
    words = device_name().replace("-", " ").split()
    found = [word for word in words if any(char.isdigit() for char in word)]
    return (found[0] if found and torch.cuda.is_available() else "cpu").lower()


def need_gpu() -> None:
    """SystemExit on a machine without a GPU."""
    if not torch.cuda.is_available():
        sys.exit(
            "error: This benchmark needs an NVIDIA GPU, and torch.cuda.is_available() is False. --table prints the committed "
            "results; benchmarks/kernels/attention_cpu.py measures the operator on a CPU."
        )


def circumstances() -> dict:
    """When, where, with which versions and by which command something is measured."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    words, arguments = [], iter(sys.argv[1:])
    for word in arguments:
        if word in NOT_OF_THE_COMMAND:
            next(arguments, None)
        elif word != "--renew" and not word.startswith(tuple(f"{name}=" for name in NOT_OF_THE_COMMAND)):
            words.append(Path(word).name if "/" in word else word)
    versions = {"gma_hf": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", script.as_posix(), *words]),
        "device": device_name(),
        "versions": versions,
    }


def finite(x):
    """`x` with null for every number that JSON has no notation for."""
    if isinstance(x, dict):
        return {name: finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Results:
    """A JSON file with one row per name; rows that it holds already are not measured again.

    Args:
        path (`Path`): the file.
        benchmark (`str`): the name of the benchmark.
        setting (`dict`): what all rows have in common.
        one_device (`bool`, *optional*, defaults to `False`): whether all rows come from one device and the same versions, as
            times must that are compared. The file then says device, versions, date and command once; otherwise each row
            says its own.
    """

    def __init__(self, path: Path, benchmark: str, setting: dict, one_device: bool = False):
        self.path, self.one_device = path, one_device
        self.report = {"benchmark": benchmark, **(circumstances() if one_device else {}), "setting": finite(setting)}
        if path.exists():
            earlier = json.loads(path.read_text())
            for name in ("benchmark", "setting", *(("device", "versions") if one_device else ())):
                ours, theirs = json.loads(json.dumps(self.report[name])), earlier[name]
                if isinstance(ours, dict):  # a setting may have lost an option since
                    theirs = {key: theirs.get(key) for key in ours}
                if theirs != ours:
                    sys.exit(
                        f"error: {path} holds rows of another {name}: {theirs}, not {ours}. Choose another --output, or --renew."
                    )
            self.report = self.of(earlier).report
        self.report.setdefault("rows", {})

    @classmethod
    def of(cls, content: dict) -> "Results":
        """Stored results, to be read only; their rows may be a list."""
        results, rows = cls.__new__(cls), content["rows"]
        results.report = {**content, "rows": rows if isinstance(rows, dict) else dict(enumerate(rows))}
        return results

    @property
    def rows(self) -> dict[str, dict]:
        return self.report["rows"]

    def find(self, **key) -> list[dict]:
        """The rows that have these values."""
        return [row for row in self.rows.values() if all(row.get(name) == value for name, value in key.items())]

    def get(self, field: str, **key) -> float | None:
        """One number of the first row with these values, or None if it was not measured."""
        return next((row[field] for row in self.find(**key) if row.get(field) is not None), None)

    def measure(self, name: str | dict, function: Callable[[], dict]) -> dict:
        """The row of that name, measured now if it is not there; a name may be a dict, which becomes part of the row."""
        key = name if isinstance(name, dict) else {}
        name = ", ".join(map(str, key.values())) if key else name
        if name not in self.rows:
            print(f"\n=== {name}", flush=True)
            start = time.monotonic()
            row = {**key, **function()}
            if not self.one_device:
                row["total_seconds"] = round(time.monotonic() - start, 1)
                row.update(circumstances())
            self.add(name, row)
            shown = {
                field: value for field, value in row.items() if isinstance(value, (float, str)) and field not in key
            }
            if self.one_device:
                print(
                    "  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
                )
        return self.rows[name]

    def add(self, name: str, row: dict) -> None:
        """Put a row in and write the file."""
        self.rows[name] = finite(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")
