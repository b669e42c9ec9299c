#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Long-context classification by bidirectional models: ListOps, bytes of movie reviews, 20 Newsgroups.

    python benchmarks/quality/long_context_classification.py --data DATA --prepare classification.pt.xz
    python benchmarks/quality/long_context_classification.py --prepared classification.pt.xz --seeds 0 1 2 --per_gpu 3
    python benchmarks/quality/long_context_classification.py --table --plot

The same encoder (4 layers of width 256, 4 heads of dimension 64, 64 components) with each sequence mixer, from random weights,
as large as the softmax model within 3% (the width of the MLP makes up for the rest, the table of learned positions counted),
trained on the same batches for the same number of steps. A model pools the mean of its last hidden states.

- `listops`: see listops.py; 96,000 expressions of 500 to 2,000 symbols, one token each.
- `imdb`: Long Range Arena's "Text": reviews as bytes, cut at 4,096; half of them positive.
- `newsgroups`: posts without headers, quotes and signatures, by a BPE of 8,192 tokens trained on the training posts; cut at
  2,048, though only one post in twenty reaches 1,024.

DATA holds `imdb` and `20newsgroups`, files `train.jsonl.xz` and `test.jsonl.xz` with `text` and `label`. ListOps is generated.
A thousand training examples (ListOps: expressions of their own) are held out for the curve; the test set is looked at once, at
the end. Rows that the output file holds already are not measured again; of several `--rates` the tables show the best of each mixer
by the accuracy on the held-out examples.

Batches hold examples of similar length, padded to a multiple of 256. The mask of the padding keeps SDPA from its
FlashAttention kernel, which takes none: scaling.py compares the operators without padding.
"""

import argparse
import json
import statistics
import sys
from functools import cache, partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch

from benchmarks.lib.results import FIGURES, Results, add_output_options, device, output_path, stored
from benchmarks.lib.runner import Row, add_run_options, run_rows
from benchmarks.lib.tables import colour, markdown, mean_and_spread, pyplot, save_figure
from benchmarks.lib.training import compile_blocks, evaluating, train
from benchmarks.quality.classification_data import (
    TASKS,
    Examples,
    batches_by_length,
    collate,
    load,
    prepare,
    rounded_up,
)
from benchmarks.rivals.mixers import MIXERS, equal_width, make_config, make_model
from gma_hf import GMAForSequenceClassification


# What may be compared: a mixer and what its configuration has besides. Bidirectional, the gated block has no forgetting and
# knows order by its convolution alone; the last two give it learned positions, or a window of exact softmax.
BIDIRECTIONAL = [name for name, mixer in MIXERS.items() if mixer.only != "causal" and name != "hybrid"]
CONTENDERS = {
    **{name: (name, {}) for name in sorted(BIDIRECTIONAL, key=lambda name: name.startswith("gma"))},
    "gma_gated_positions": ("gma_gated", {"position_embedding_type": "learned"}),
    "gma_gated_window": ("gma_gated", {"window_size": 32}),
}
DEFAULT_CONTENDERS = [
    "softmax",
    "softmax_gated",
    "linear_gated",
    "linformer",
    "elu",
    "performer",
    "gma_paper",
    "gma_gated",
]
TITLES = {
    **{name: MIXERS[name].title for name in CONTENDERS if name in MIXERS},
    "gma_gated_positions": "GMA, gated block, learned positions",
    "gma_gated_window": "GMA, gated block, softmax window of 32 to each side",
}
RATE = 5e-4  # of the committed rows, whose names do not say it
TOKENS_PER_EVALUATION = 65536


def accuracy(model, examples: Examples, tokens_per_batch: int = TOKENS_PER_EVALUATION) -> float:
    correct = torch.zeros((), dtype=torch.long, device=device())
    with evaluating(model):
        for batch in batches_by_length(examples, model.config.pad_token_id, tokens_per_batch):
            batch = {name: x.to(device(), non_blocking=True) for name, x in batch.items()}
            labels = batch.pop("labels")
            correct += (model(**batch).logits.argmax(dim=-1) == labels).sum()
    return correct.item() / len(examples)


def run(task: str, contender: str, seed: int, recipe: dict, splits: dict[str, Examples], compile: bool) -> dict:
    """Train one model and test it."""
    mixer, overrides = CONTENDERS[contender]
    description = TASKS[task]
    shared = {
        **recipe["sizes"],
        "vocab_size": description.vocab_size,
        "pad_token_id": description.pad_token_id,
        "max_position_embeddings": rounded_up(max(split.lengths.max() for split in splits.values())),
        "num_labels": description.num_labels,
        "is_causal": False,
    }
    sizes = {**shared, **overrides}
    sizes["intermediate_size"] = equal_width(mixer, sizes, "softmax", shared, GMAForSequenceClassification, (8,))
    config = make_config(mixer, **sizes, hidden_dropout=recipe["dropout"])
    torch.manual_seed(seed)
    model = make_model(mixer, config, GMAForSequenceClassification)
    if compile:
        compile_blocks(model, dynamic=True)  # batches differ in length
    pad = partial(collate, pad_token_id=description.pad_token_id)
    row = train(
        model,
        splits["train"],
        pad,
        recipe,
        seed,
        score=lambda: accuracy(model, splits["valid"]),
        train_sampling_strategy="group_by_length",
    )
    return {
        "recipe": recipe,
        "task": task,
        "contender": contender,
        "seed": seed,
        "intermediate_size": sizes["intermediate_size"],
        "train_examples": len(splits["train"]),
        "test_examples": len(splits["test"]),
        "mean_length": round(float(splits["test"].lengths.mean()), 1),
        "majority_accuracy": round(splits["test"].majority_accuracy, 5),
        "test_accuracy": round(accuracy(model, splits["test"]), 5),
        **row,
    }


def summarize(rows: list[dict]) -> dict[str, float]:
    """Mean and spread over the seeds of one task and contender."""
    accuracies = [100 * row["test_accuracy"] for row in rows]
    return {
        "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(rows) > 1 else None,
        "ms_per_step": statistics.mean(row["ms_per_step"] for row in rows),
    }


def by_task(rows: dict[str, dict]) -> dict[str, dict[str, list[dict]]]:
    """The rows of every task and contender, in the order of both tables above; those of the best rate."""
    found = {}
    for task in TASKS:
        for contender in CONTENDERS:
            by_rate: dict[float, list[dict]] = {}
            for row in rows.values():
                if (row["task"], row["contender"]) == (task, contender):
                    by_rate.setdefault(row["recipe"]["learning_rate"], []).append(row)
            if by_rate:
                found.setdefault(task, {})[contender] = max(
                    by_rate.values(), key=lambda own: statistics.mean(row["curve"][-1][1] for row in own)
                )
    return found


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown, one table per task."""
    lines = []
    for task, contenders in by_task(rows).items():
        first = next(iter(contenders.values()))[0]
        recipe = first["recipe"]
        found = []
        for contender, own in contenders.items():
            values, memory = summarize(own), own[0]["peak_memory_gib"]
            score = mean_and_spread(values["accuracies"], 1)
            cells = [TITLES[contender], str(len(own)), f"{own[0]['parameters'] / 1e6:.2f} M", score]
            found.append([*cells, f"{values['ms_per_step']:.1f}", "" if memory is None else f"{memory:.1f}"])
        lines += [
            f"**{TASKS[task].title}**: {first['train_examples']:,} training and {first['test_examples']:,} test examples of "
            f"{first['mean_length']:,.0f} tokens in the mean; {recipe['steps']:,} steps of {recipe['batch_size']}; always "
            f"guessing the commonest class gives {100 * first['majority_accuracy']:.1f} %.",
            "",
            markdown(["mixer", "seeds", "parameters", "test accuracy, %", "ms per step", "peak memory, GiB"], found),
            "",
        ]
    return "\n".join(lines)


def of_all_tasks(rows: dict[str, dict]) -> dict[str, dict[str, list[dict]]]:
    """As `by_task`, without the contenders that some task does not have."""
    tasks = by_task(rows)
    common = set.intersection(*(set(contenders) for contenders in tasks.values()))
    return {
        task: {contender: own for contender, own in contenders.items() if contender in common}
        for task, contenders in tasks.items()
    }


def summary(rows: dict[str, dict]) -> str:
    """The accuracies alone, as one Markdown table."""
    tasks = of_all_tasks(rows)
    lines = [
        [TITLES[name], *(f"{summarize(contenders[name])['accuracy']:.1f}" for contenders in tasks.values())]
        for name in next(iter(tasks.values()))
    ]
    return markdown(["accuracy, %", *(TASKS[task].title for task in tasks)], lines)


def plot(rows: dict[str, dict], path: Path) -> None:
    """Accuracy and time per step, a column per task, of the contenders that all tasks have."""
    tasks = of_all_tasks(rows)
    height = 0.32 * max(map(len, tasks.values())) + 0.7
    figure, axes = pyplot().subplots(
        2, len(tasks), figsize=(1.8 + 3.4 * len(tasks), 2 * height), squeeze=False, sharey="col"
    )
    for column, (task, contenders) in enumerate(tasks.items()):
        values = {contender: summarize(own) for contender, own in contenders.items()}
        colours = [colour(CONTENDERS[contender][0]) for contender in contenders]
        for axis, field, form, title in (
            (axes[0, column], "accuracy", "{:.1f}", "test accuracy, %"),
            (axes[1, column], "ms_per_step", "{:.0f}", "milliseconds per training step"),
        ):
            numbers = [value[field] for value in values.values()]
            spreads = [value["spread"] or 0 for value in values.values()] if field == "accuracy" else None
            bars = axis.barh(range(len(numbers)), numbers, xerr=spreads, color=colours, height=0.7, ecolor="#888888")
            axis.bar_label(bars, [form.format(number) for number in numbers], padding=4, fontsize=9)
            axis.set_xlim(0, 1.15 * (max(numbers) + max(spreads or [0])))
            axis.set_xlabel(title, fontsize=9)
            axis.set_yticks(range(len(numbers)), [TITLES[contender] for contender in contenders], fontsize=9)
            axis.tick_params(axis="y", length=0, labelleft=column == 0)
            axis.tick_params(axis="x", labelsize=8)
            axis.spines[["top", "right", "left"]].set_visible(False)
        majority = 100 * next(iter(contenders.values()))[0]["majority_accuracy"]
        axes[0, column].axvline(majority, color="#888888", linewidth=1, linestyle=":")
        axes[0, column].set_title(TASKS[task].title, fontsize=10)
        axes[0, column].invert_yaxis()
    axes[0, 0].set_title(f"{axes[0, 0].get_title()}\n(dotted: always the commonest class)", fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


def wanted_rows(arguments: argparse.Namespace) -> dict[str, Row]:
    """By name, what trains and tests a row."""
    sizes = {
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_components": arguments.components,
        "intermediate_size": arguments.intermediate_size,
    }
    rows = {}

    @cache
    def splits(task: str) -> dict[str, Examples]:
        return load(task, arguments.prepared, arguments.listops_sizes, arguments.listops_lengths)

    def row(task: str, contender: str, seed: int, recipe: dict) -> dict:
        return run(task, contender, seed, recipe, splits(task), arguments.compile)

    for task in arguments.tasks:
        for seed in arguments.seeds:
            for contender in arguments.contenders:
                for rate in arguments.rates:
                    recipe = {
                        "steps": arguments.steps or TASKS[task].steps,
                        "batch_size": arguments.batch_size,
                        "learning_rate": rate,
                        "weight_decay": 0.05,
                        "dropout": TASKS[task].dropout,
                        "sizes": sizes,
                    }
                    name = f"{task}, {contender}, seed {seed}" + ("" if rate == RATE else f", rate {rate:g}")
                    rows[name] = Row(partial(row, task, contender, seed, recipe), recipe)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets, for --prepare")
    parser.add_argument("--prepare", type=Path, help="tokenize into this file, and nothing else")
    parser.add_argument("--prepared", type=Path, help="that file")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=DEFAULT_CONTENDERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of every task instead of its own number")
    parser.add_argument("--batch_size", type=int, default=32, help="examples per step")
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE], help="learning rates of every mixer")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--intermediate_size", type=int, default=704, help="of the softmax model")
    parser.add_argument("--listops_sizes", type=int, nargs=3, default=[96_000, 2000, 2000], help="train, valid, test")
    parser.add_argument("--listops_lengths", type=int, nargs=2, default=[500, 2000], help="between these, exclusive")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="the blocks")
    parser.add_argument("--plot", action="store_true", help="only draw the figure")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    add_run_options(parser)
    add_output_options(parser, "long_context_classification")
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        if arguments.data is None:
            parser.error("--prepare needs --data")
        prepare(arguments.data, arguments.prepare)
        return
    if not (arguments.table or arguments.plot):
        arguments.output = output_path(arguments)
        results = Results(arguments.output, "long_context_classification", {})
        run_rows(results, wanted_rows(arguments), arguments)
    for path in stored(arguments):
        rows = json.loads(path.read_text())["rows"]
        print("\n" + table(rows))
        if arguments.plot:
            plot(rows, arguments.figures / "long_context_classification.png")


if __name__ == "__main__":
    main()
