# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/kernels/scaling.py` and the page of results: what they say is what was measured."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results_page
from benchmarks.conversion.minilm import table as minilm_table
from benchmarks.conversion.smollm2 import table as smollm2_table
from benchmarks.kernels import attention_accuracy, attention_gpu, decoding_gpu, scaling, scaling_report
from benchmarks.lib.command import add_output_options, output_path
from benchmarks.lib.results import Results
from benchmarks.rivals.operators import TOLERANCE, Shape, make_inputs, measure_error


ROOT = Path(__file__).parents[2]


def report_of(times: dict[str, dict[int, float]]) -> dict:
    rows = [
        {"rival": name, "pass": part, "length": length, "ms": ms, "peak_mib": length / 16}
        for name, measured in times.items()
        for part in scaling.PASSES
        for length, ms in measured.items()
    ]
    setting = {"device": "toy", "dtype": "float32"}
    return {"setting": setting, "rows": {f"{row['rival']}, {row['pass']}, {row['length']}": row for row in rows}}


@pytest.mark.quick
def test_the_slope_is_the_exponent_of_the_growth_at_the_longest_lengths():
    lengths = [2**n for n in range(10, 18)]
    # 5 ms of launching, which the short lengths show, and a square behind it
    assert scaling_report.slope({n: 5 + 1e-6 * n**2 for n in lengths}) == pytest.approx(2, abs=0.01)
    assert scaling_report.slope({n: 3e-4 * n for n in lengths}) == pytest.approx(1, abs=1e-9)
    assert scaling_report.slope({1024: 1.0, 2048: 2.0}) is None


@pytest.mark.quick
def test_rivals_compute_causal_sequence_mixers_of_the_same_width():
    """No output looks ahead, and the gradients reach every input."""
    for name, rival in scaling.RIVALS.items():
        if rival.needs_gpu:
            continue
        shape = scaling.SHAPE._replace(length=160)
        inputs = make_inputs(rival.names, shape, torch.float32, "cpu")
        output = rival.function(inputs)
        tokens = output.shape.index(160)
        assert output.numel() == 160 * shape.heads * shape.dim * (2 if name == "Mamba-2" else 1)
        gradients = torch.autograd.grad(output.narrow(tokens, 0, 100).square().sum(), list(inputs.values()))
        for key, gradient in zip(inputs, gradients, strict=True):
            assert gradient.abs().sum() > 0, (name, key)
            if 160 in gradient.shape:
                later = gradient.narrow(gradient.shape.index(160), 100, 60)
                assert later.abs().max() == 0, (name, key)


@pytest.mark.quick
def test_what_would_take_too_long_or_too_much_memory_is_not_tried():
    softmax = {"rival": "softmax (SDPA)", "length": 1024, "ms": 1000.0, "peak_mib": 100.0}
    assert (
        scaling.too_long(softmax, 4096, longest=10) == "would take some 16 s"
    )  # four times as long: 16 times the time
    assert scaling.too_long({**softmax, "rival": "GMA, paper"}, 4096, longest=10) is None
    assert scaling.too_long({"refused": "out of memory"}, 4096, longest=10) == "out of memory"
    assert scaling.no_memory(softmax, 2048, available=1000) is None
    assert scaling.no_memory({**softmax, "peak_mib": 2048.0}, 2048, available=4096) == "would need some 4 GiB"


def test_a_run_goes_on_where_it_was_stopped_and_draws_its_figure(tmp_path, monkeypatch, capsys):
    output = tmp_path / "scaling_toy.json"
    monkeypatch.setattr(scaling, "check", lambda device: None)
    words = ["--device", "cpu", "--seconds", "0.001", "--rivals", "GMA, paper", "linear attention"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["scaling.py", *words, "--output", str(output), *more])
        scaling.main()

    run("--lengths", "128", "256")
    first = json.loads(output.read_text())["rows"]
    run("--lengths", "128", "256", "512", "--plot")
    rows = json.loads(output.read_text())["rows"]
    assert {name: rows[name] for name in first} == first
    assert len(rows) == 2 * 2 * 3
    assert all(row["ms"] > 0 and row["peak_mib"] >= 0 for row in rows.values())
    assert "| exponent |" in capsys.readouterr().out
    assert (tmp_path / "scaling_toy.png").exists()
    both = [row for row in rows.values() if row["pass"] == "forward_backward"]
    for axis, field in zip(scaling_report.plot(json.loads(output.read_text())).axes, ("ms", "peak_mib"), strict=True):
        shown = [(x, y) for line in axis.lines for x, y in zip(*line.get_data(), strict=True)]
        assert sorted(shown) == sorted((row["length"], row[field]) for row in both)


@pytest.mark.quick
def test_the_table_leaves_out_what_was_refused():
    report = report_of({"GMA, paper": {1024: 2.0, 2048: 4.0, 4096: 8.0}, "softmax (SDPA)": {1024: 1.0}})
    assert scaling_report.table(report).splitlines() == [
        "| tokens | GMA, paper | softmax (SDPA) |",
        "|---:|---:|---:|",
        "| 1k | 2 | 1 |",
        "| 2k | 4 |  |",
        "| 4k | 8 |  |",
        "| exponent | 1.00 |  |",
    ]


def test_the_tables_of_every_page_are_what_the_committed_results_say():
    assert list(results_page.stale_pages()) == []


@pytest.mark.quick
def test_tables_of_other_pages_come_from_the_results():
    pages = {path.name: path.read_text(encoding="utf-8") for path in results_page.OTHER_PAGES}
    shown = [name for page in pages.values() for name in re.findall(r"<!-- measured: (\w+), ", page)]
    assert "gpu_attention_h200" in shown and "parallel_h200" in shown
    # Each mark has its end, so a table that somebody writes by hand between them is found
    for name, page in pages.items():
        assert (
            page.count("<!-- measured: ") == page.count("<!-- end -->") == len(results_page.MEASURED.findall(page))
        ), name
    page = pages["README.md"]
    changed = page.replace("| 16,384 | 17.8 ms", "| 16,384 | 18.8 ms")
    assert changed != page == results_page.with_tables(changed)


@pytest.mark.quick
def test_experiments_without_results_have_no_section(tmp_path):
    assert results_page.page(tmp_path, tmp_path) == results_page.parts()[0] + "\n"
    report = report_of({"GMA, paper": {1024: 2.0, 2048: 4.0, 4096: 8.0}})
    for row in report["rows"].values():
        row.update(
            command="python benchmarks/kernels/scaling.py",
            date="2026-11-22T10:00:00+00:00",
            versions={"torch": "2.11"},
        )
    for name in ("scaling_a100", "scaling_a100_more"):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
        (tmp_path / f"{name}.png").touch()
    page = results_page.page(tmp_path, tmp_path)
    assert re.findall(r"^## .*", page, flags=re.MULTILINE) == ["## Scaling with the length"]
    assert "python benchmarks/kernels/scaling.py" in page and "Measured on toy; torch 2.11; 2026-11-22." in page
    assert page.count("| 1k | 2 |") == 4  # forward, and forward and backward, of each file
    assert page.count("scaling_a100.png") == page.count("scaling_a100_more.png") == 1


def test_everything_that_the_page_names_exists():
    page = results_page.page()
    for name in set(re.findall(r"(?:scripts|benchmarks)/[\w/]+\.py", page)):
        assert (ROOT / name).is_file(), name
    for name in set(re.findall(r"\]\(([^)h][^)]*)\)", page)):
        assert (ROOT / "docs" / name).exists(), name


@pytest.mark.quick
def test_numbers_of_other_benchmarks_are_shown_as_they_were_stored(tmp_path):
    smollm2 = {
        "original": {"title": "original, softmax", "scores": {"original": {"perplexity": 20.0}}},
        "window": {"title": "window", "scores": {"distilled": {"perplexity": 21.0, "kl": 0.05}}},
    }
    minilm = {
        "all": {"cosine": {"before": {}, "after": {"WikiText-103": 0.97, "IMDB": 0.96}}, "newsgroups": [70.0, 72.0]}
    }
    assert "| window: distilled | 21.00 | 1.050 | 0.0500 |" in smollm2_table({"rows": smollm2})
    assert "| all | 0.9700 | 0.9600 | 71.00 ± 1.41 |" in minilm_table({"rows": minilm})
    decode = {"model": "softmax + RoPE", "mode": "eager", "batch": 1, "position": 1024}
    rows = [{**decode, "ms_per_token": 1.5, "tokens_per_second": 666.7}]
    assert "1.500 (667)" in decoding_gpu.tables({"rows": rows})


@pytest.mark.quick
def test_speed_is_compared_with_softmax_as_users_call_it():
    """SDPA's default is the rival where it was measured, and both tables together hold every comparison once."""

    def row(name: str, forward: float, both: float, length: int = 2048) -> dict:
        shape = {"batch": 32, "length": length, "heads": 16, "dim": 64, "components": 64}
        times = {"forward_ms": forward, "forward_backward_ms": both}
        return {"part": "speed", "rival": name, **shape, **times}

    rows = [row("GMA normalised", 0.5, 2.0), row("SDPA flash", 1.0, 5.0)]
    summary = attention_gpu.summary({"rows": rows})
    assert "| 2,048 | 5.0 ms | 2.0 ms | 2.5x |" in summary and "FlashAttention-2 / GMA" in summary
    rows += [row("SDPA", 0.75, 3.0), row("fla chunk_linear_attn", 0.25, 1.0)]
    summary = attention_gpu.summary({"rows": rows})
    assert "| 2,048 | 3.0 ms | 5.0 ms | 1.0 ms | 2.0 ms | 1.5x |" in summary and "SDPA / GMA" in summary
    ahead, behind = attention_gpu.comparison({"rows": rows}).split("Where others are ahead:")
    assert "| GMA normalised | SDPA, default | forward and backward | 2,048 | 1.50 |" in ahead
    assert "| GMA normalised | fla chunk_linear_attn | forward | 2,048 | 2.00 |" in behind
    assert "chunk_linear_attn" not in ahead and "SDPA" not in behind


@pytest.mark.quick
def test_rows_have_the_names_of_the_committed_ones():
    """A run goes on with the committed results of the operator, whose rows it finds by their names."""
    content = json.loads((ROOT / "benchmarks" / "results" / "gpu_attention_h200.json").read_text())
    keys = [key for part in attention_gpu.PARTS for key, _ in attention_gpu.calls(part, 0.1)]
    names = [", ".join(map(str, key.values())) for key in keys]
    assert len(names) == len(set(names)) and set(content["rows"]) <= set(names)


@pytest.mark.quick
def test_errors_are_those_of_the_operator():
    shape = Shape(batch=2, length=48, heads=2, dim=16, components=4)
    for variant in ("normalised", "un-normalised, decay", "correlated, decay"):
        # Against itself in float64: three roundings to bfloat16 at most, and not none
        assert 1e-4 < measure_error(variant, shape, "chunked", "cpu")["relative_error"] < TOLERANCE
    for case in ("gated", "outliers, plain", "padding, correlated"):
        found = attention_accuracy.measure_case(case, torch.bfloat16, "chunked", shape, "cpu")
        # A backend beside itself
        assert all(own == plain > 0 for own, plain in found["errors"].values()), case
        assert found["worst_ratio"] <= 1


@pytest.mark.quick
def test_committed_results_are_not_overwritten(tmp_path, monkeypatch):
    """Without `--output` a run writes to the current folder; rows of another setting or device are refused."""
    parser = argparse.ArgumentParser()
    add_output_options(parser, "scaling_*")
    path = output_path(parser.parse_args([]))
    assert path.parent == Path() and path.name.startswith("scaling_")
    monkeypatch.setattr(sys, "argv", ["benchmarks/kernels/some.py", "--seconds", "1", "--output", "a/b.json"])
    results = Results(tmp_path / "a.json", "toy", {"size": 1}, one_device=True)
    results.measure({"rival": "a", "length": 2}, lambda: {"ms": float("nan")})
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["rows"] == {"a, 2": {"rival": "a", "length": 2, "ms": None}}
    assert {"device", "versions", "date"} <= set(content) and content["command"].endswith("some.py --seconds 1")
    again = Results(tmp_path / "a.json", "toy", {"size": 1}, one_device=True)
    again.measure({"rival": "a", "length": 2}, lambda: pytest.fail("a row was measured again"))
    with pytest.raises(SystemExit, match="another setting"):
        Results(tmp_path / "a.json", "toy", {"size": 2}, one_device=True)
