#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The search for the block that recalls: plain PyTorch prototypes of mixers, all in the same model, on recall and language.

    python benchmarks/quality/block_search/run.py --tasks recall needle --rows correlated gated mamba2_like
    python benchmarks/quality/block_search/run.py --tasks lm --prepared lm.pt --rows correlated softmax
    python benchmarks/quality/block_search/run.py --table

Recall and needle are those of `recall.py`, at equal state: 2 layers of width 128 with 2 heads hold 16,640 numbers, whatever the
mixer, unless it is softmax or has more components. Every rate and seed is a model; all models of a row train side by side.
Language models have 36 million parameters and see 55 million tokens of Wikipedia. Rows that the output file holds are kept.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean


sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that `benchmarks` can be imported

from benchmarks.conversion.common import ROOT, Results
from benchmarks.quality.block_search.model import Block
from benchmarks.quality.block_search.training import train_language_model, train_recall


CORRELATED = Block(
    relative=True, unit_length=True, qk_norm=True, variance=10.0, tie=True, head_eps=1e-4, output_scale=None
)
ROWS = {
    "correlated": CORRELATED,
    "correlated_256": replace(CORRELATED, components=256),
    "correlated_loud": replace(CORRELATED, output_scale=1.0),
    "correlated_untied": replace(CORRELATED, tie=False),
    "correlated_share": replace(CORRELATED, share=0.1),
    "correlated_8_mixtures": replace(CORRELATED, mixtures=8),
    "signed_sigmoids": replace(CORRELATED, mixer="signed_sigmoids"),
    "gated": Block(),
    "gated_eps": Block(head_eps=1e-5),
    "linear": Block("linear", tie=True, head_eps=1e-4, output_scale=None),
    "mamba2_like": Block("mamba2_like", head_eps=1e-4, output_scale=None),
    "gated_delta": Block("gated_delta", head_eps=1e-4, output_scale=None),
    "softmax": Block("softmax", output_scale=None),
    "softmax_plain": Block("softmax", conv_and_gate=False, output_scale=None),
}
TASKS = ("recall", "needle", "lm")


def table(rows: dict) -> str:
    """Every row in a line: the best rate's mean over the seeds, or the perplexities."""
    lines = []
    for name, row in sorted(rows.items()):
        if "accuracy" in row:
            parts = []
            for test, scores in row["accuracy"].items():
                by_rate: dict[float, list[float]] = {}
                for (rate, _), score in zip(row["models"], scores, strict=True):
                    by_rate.setdefault(rate, []).append(score)
                rate, best = max(by_rate.items(), key=lambda item: mean(item[1]))
                parts.append(f"{test}: {mean(best):.1f} ({rate:g})")
            lines.append(f"{name}: " + ", ".join(parts))
        else:
            lines.append(f"{name}: {row['wikipedia_valid']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["recall"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["correlated", "gated", "mamba2_like"])
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2], help="of recall, needle"
    )
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of language models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: 3,000; language models 840")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024], help="of language models")
    parser.add_argument("--tokens_per_step", type=int, default=65_536, help="of language models")
    parser.add_argument("--parameters", type=int, default=36_000_000, help="of language models")
    parser.add_argument("--prepared", type=Path, metavar="FILE", help="of language_modeling.py --prepare")
    parser.add_argument("--table", action="store_true", help="only print the output file")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "block_search.json")
    options = parser.parse_args()
    results = Results(options.output, "block_search", {"implementation": "plain PyTorch prototype"})
    for task in () if options.table else options.tasks:
        for row in options.rows:
            block, described = ROWS[row], {"row": row, "block": asdict(ROWS[row])}
            if task != "lm":
                steps = options.steps or 3000
                name = f"{task}, {row}, {steps} steps"
                measure = lambda: train_recall(task, block, options.learning_rates, options.seeds, steps)  # noqa: B023, E731
                results.measure(name, lambda: {**described, **measure()})  # noqa: B023
                continue
            if options.prepared is None:
                parser.error("--tasks lm needs --prepared.")
            for context in options.contexts:
                for seed in options.seeds:
                    steps = options.steps or 840
                    recipe = (options.prepared, options.learning_rate, seed, steps, context, options.parameters)
                    name = f"lm, {row}, context {context}, {steps} steps of {options.tokens_per_step}, seed {seed}"
                    measure = lambda: train_language_model(block, *recipe, options.tokens_per_step)  # noqa: B023, E731
                    results.measure(name, lambda: {**described, "seed": seed, **measure()})  # noqa: B023
    print(table(results.rows))


if __name__ == "__main__":
    main()
