#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The search for the block that recalls: plain PyTorch prototypes of mixers, all in the same model, on recall and language.

    python benchmarks/quality/block_search/run.py --tasks recall needle --rows correlated gated mamba2_like --per_gpu 3
    python benchmarks/quality/block_search/run.py --tasks lm --prepared lm.pt --rows correlated softmax
    python benchmarks/quality/block_search/run.py --table

Recall and needle are those of `recall.py`, at equal state: 2 layers of width 128 with 2 heads hold 16,640 numbers, whatever the
mixer, unless it is softmax or has more components. Every rate and seed is a model; all models of a row train side by side.
Language models have 36 million parameters and see 55 million tokens of Wikipedia. Rows that the output file holds are kept.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean


sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that `benchmarks` can be imported

from benchmarks.lib.results import Results, add_output_options, output_path, stored
from benchmarks.lib.runner import Row, add_run_options, run_rows
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
    "gated_quiet": Block(output_scale=None),
    "linear": Block("linear", tie=True, head_eps=1e-4, output_scale=None),
    "mamba2_like": Block("mamba2_like", head_eps=1e-4, output_scale=None),
    "gated_delta": Block("gated_delta", head_eps=1e-4, output_scale=None),
    "softmax": Block("softmax", output_scale=None),
    "softmax_plain": Block("softmax", conv_and_gate=False, output_scale=None),
}
TASKS = ("recall", "needle", "lm")
STEPS = {"recall": 3000, "needle": 3000, "lm": 840}


def table(rows: dict[str, dict]) -> str:
    """Every row in a line: the mean over the seeds at the best rate of each test, or the perplexities."""
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
            found = row["wikipedia_valid"]
            lines.append(f"{name}: perplexity " + ", ".join(f"{part} {value:g}" for part, value in found.items()))
    return "\n".join(lines)


def wanted_rows(options: argparse.Namespace) -> dict[str, Row]:
    """What is to be measured, by name, with the recipe of each row."""
    rows = {}
    for task in options.tasks:
        steps = options.steps or STEPS[task]
        for name in options.rows:
            block = ROWS[name]
            recipe = {"task": task, "block": asdict(block), "steps": steps}
            if task != "lm":
                recipe |= {"rates": options.rates, "seeds": options.seeds}
                train = partial(train_recall, task, block, options.rates, options.seeds, steps)
                rows[f"{task}, {name}, {steps} steps"] = Row(partial(measured, recipe, train), recipe)
                continue
            for context in options.contexts:
                for seed in options.seeds:
                    for rate in options.lm_rates:
                        arguments = (rate, seed, steps, context, options.parameters, options.tokens_per_step)
                        names = ("rate", "seed", "steps", "context", "parameters", "tokens_per_step")
                        own = {**recipe, **dict(zip(names, arguments, strict=True))}
                        train = partial(train_language_model, block, options.prepared, *arguments)
                        title = f"lm, {name}, context {context}, {steps} steps of {options.tokens_per_step}"
                        rows[f"{title}, rate {rate:g}, seed {seed}"] = Row(partial(measured, own, train), own)
    return rows


def measured(recipe: dict, train) -> dict:
    return {"recipe": recipe, **train()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["recall"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["correlated", "gated", "mamba2_like"])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2], help="of recall and needle")
    parser.add_argument("--lm_rates", type=float, nargs="+", default=[2e-3], help="of language models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: 3,000; language models 840")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024], help="of language models")
    parser.add_argument("--tokens_per_step", type=int, default=65_536, help="of language models")
    parser.add_argument("--parameters", type=int, default=36_000_000, help="of language models")
    parser.add_argument("--prepared", type=Path, metavar="FILE", help="of language_modeling.py --prepare")
    add_output_options(parser, "block_search")
    add_run_options(parser)
    options = parser.parse_args()
    if options.table:
        for path in stored(options):
            print(table(Results.of(json.loads(path.read_text())).rows))
        return
    if "lm" in options.tasks and options.prepared is None:
        parser.error("--tasks lm needs --prepared.")
    results = Results(output_path(options), "block_search", {"implementation": "plain PyTorch prototypes"})
    run_rows(results, wanted_rows(options), options)
    print(table(results.rows))


if __name__ == "__main__":
    main()
