# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/kernels/serving_gpu.py`: it compares before it times, and every row of its tables was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import serving_gpu


SCRIPT = Path(serving_gpu.__file__)
TINY = ["--device", "cpu", "--streams", "2", "3", "--lengths", "16", "40", "--chunk", "4", "--heads", "4", "--dim", "8",
        "--components", "4", "--seconds", "0.01"]  # fmt: skip


def test_it_runs_on_a_processor_and_says_what_it_measured(tmp_path):
    path = tmp_path / "serving.json"
    words = [sys.executable, str(SCRIPT), *TINY, "--output", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert content["command"].startswith("python benchmarks/kernels/serving_gpu.py --device cpu")
    assert {"date", "device", "versions"} <= content.keys() and "torch" in content["versions"]
    errors = content["rows"].pop("comparison with the definition")["relative_errors"]
    expected = {f"{kind} {way}" for kind, way in (("prefill", "packed"), ("decode", "copied"))}
    assert set(errors) == expected | {"prefill in slots", "decode in slots"} and max(errors.values()) < 1e-4
    # At two numbers of streams: rows of GMA, and of softmax at two lengths
    assert len(content["rows"]) == 2 * ((2 + 2 * 2) + (4 + 3 * 2))
    assert all(row["ms"] > 0 and row["mib"] > 0 for row in content["rows"].values())
    assert "decode: ms of one layer" in done.stdout and "softmax, shared keys, 40 tokens" in done.stdout


def test_nothing_is_timed_when_the_numbers_are_wrong(monkeypatch):
    layer = serving_gpu.Layer(4, 8, 4, "cpu")
    monkeypatch.setattr(serving_gpu, "decode_in_slots", lambda layer, tokens, *rest: torch.zeros_like(tokens["query"]))
    with torch.no_grad(), pytest.raises(SystemExit, match=r"nothing is timed.*decode in slots"):
        serving_gpu.compare_with_the_definition(layer)


@pytest.mark.parametrize(("streams", "chunk"), [(32, 128), (7, 5), (1, 3)])
def test_ragged_streams_have_as_many_tokens(streams, chunk):
    lengths = serving_gpu.ragged_lengths(streams, chunk)
    assert len(lengths) == streams and sum(lengths) == streams * chunk and min(lengths) > 0
