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

- `listops`: see tasks/listops.py; 96,000 expressions of 500 to 2,000 symbols, one token each.
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
import itertools
import statistics
import sys
from functools import cache, partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch

from benchmarks.lib.command import command
from benchmarks.lib.results import Results, device
from benchmarks.lib.runner import Row, add_run_options, run_rows
from benchmarks.lib.tables import COLOURS, GREY, markdown, mean_and_spread, of_best_rate, pyplot
from benchmarks.lib.training import compile_blocks, evaluating, train
from benchmarks.quality.tasks import classification as data
from benchmarks.quality.tasks.classification import TASKS, Examples
from benchmarks.rivals.mixers import COMPARED, MIXERS, equal_width, make_config, make_model, program_of
from gma_hf import GMAForSequenceClassification


# What may be compared: a mixer and what its configuration has besides. Bidirectional, the gated block has no forgetting and
# knows order by its convolution alone; the last two give it learned positions, or a window of exact softmax.
BIDIRECTIONAL = [name for name in COMPARED if MIXERS[name].only != "causal" and name != "hybrid"]
CONTENDERS = {
    **{name: (name, {}) for name in sorted(BIDIRECTIONAL, key=lambda name: name.startswith("gma"))},
    "gma_gated_positions": ("gma_gated", {"position_embedding_type": "learned"}),
    "gma_gated_window": ("gma_gated", {"window_size": 32}),
}
DEFAULT_CONTENDERS = "softmax softmax_gated linear_gated linformer elu performer gma_paper gma_gated".split()
TITLES = {
    **{name: MIXERS[name].title for name in BIDIRECTIONAL},
    "gma_gated_positions": "GMA, gated block, learned positions",
    "gma_gated_window": "GMA, gated block, softmax window of 32 to each side",
}
RATE = 5e-4  # of the committed rows, whose names do not say it
TOKENS_PER_EVALUATION = 65536


def accuracy(model, examples: Examples, tokens_per_batch: int = TOKENS_PER_EVALUATION) -> float:
    correct = torch.zeros((), dtype=torch.long, device=device())
    with evaluating(model):
        for batch in data.batches_by_length(examples, model.config.pad_token_id, tokens_per_batch):
            batch = {name: x.to(device(), non_blocking=True) for name, x in batch.items()}
            labels = batch.pop("labels")
            correct += (model(**batch).logits.argmax(dim=-1) == labels).sum()
    return correct.item() / len(examples)


def run(task: str, contender: str, seed: int, recipe: dict, splits: dict[str, Examples], compile: bool) -> dict:
    """Train one model and test it."""
    mixer, overrides = CONTENDERS[contender]
    description = TASKS[task]
    shared = {
        **recipe["sizes"], "vocab_size": description.vocab_size, "pad_token_id": description.pad_token_id,
        "max_position_embeddings": data.rounded_up(max(split.lengths.max() for split in splits.values())),
        "num_labels": description.num_labels, "is_causal": False,
    }  # fmt: skip
    sizes = {**shared, **overrides}
    sizes["intermediate_size"] = equal_width(mixer, sizes, "softmax", shared, GMAForSequenceClassification, (8,))
    config = make_config(mixer, **sizes, hidden_dropout=recipe["dropout"])
    torch.manual_seed(seed)
    model = make_model(mixer, config, GMAForSequenceClassification)
    if compile:
        compile_blocks(model, dynamic=True)  # batches differ in length
    pad = partial(data.collate, pad_token_id=description.pad_token_id)
    row = train(
        model, splits["train"], pad, recipe, seed, score=lambda: accuracy(model, splits["valid"]),
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    return {
        "recipe": recipe, "task": task, "contender": contender, "seed": seed, **program_of(mixer),
        "intermediate_size": sizes["intermediate_size"], "train_examples": len(splits["train"]),
        "test_examples": len(splits["test"]), "mean_length": round(float(splits["test"].lengths.mean()), 1),
        "majority_accuracy": round(splits["test"].majority_accuracy, 5),
        "test_accuracy": round(accuracy(model, splits["test"]), 5), **row,
    }  # fmt: skip


def accuracies(rows: list[dict]) -> list[float]:
    return [100 * row["test_accuracy"] for row in rows]


def milliseconds(rows: list[dict]) -> list[float]:
    return [statistics.mean(row["ms_per_step"] for row in rows)]


def by_task(rows: dict[str, dict]) -> dict[str, dict[str, list[dict]]]:
    """The rows of every task and contender, in the order of both tables above; those of the best rate."""
    best = of_best_rate(
        rows.values(),
        key=lambda row: (row["task"], row["contender"]),
        rate=lambda row: row["recipe"]["learning_rate"],
        score=lambda own: statistics.mean(row["curve"][-1][1] for row in own),
    )
    found = {task: {name: best[task, name] for name in CONTENDERS if (task, name) in best} for task in TASKS}
    return {task: contenders for task, contenders in found.items() if contenders}


def title_of(row: dict) -> str:
    """The contender's title, with the program that computed the row."""
    return MIXERS[row["contender"]].title_of(row) if row["contender"] in MIXERS else TITLES[row["contender"]]


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown, one table per task."""
    lines = []
    for task, contenders in by_task(rows).items():
        first = next(iter(contenders.values()))[0]
        recipe = first["recipe"]
        found = []
        for own in contenders.values():
            memory, score = own[0]["peak_memory_gib"], mean_and_spread(accuracies(own), 1)
            cells = [title_of(own[0]), str(len(own)), f"{own[0]['parameters'] / 1e6:.2f} M", score]
            found.append([*cells, f"{milliseconds(own)[0]:.1f}", "" if memory is None else f"{memory:.1f}"])
        lines += [
            f"**{TASKS[task].title}**: {first['train_examples']:,} training and {first['test_examples']:,} test examples of "
            f"{first['mean_length']:,.0f} tokens in the mean; {recipe['steps']:,} steps of {recipe['batch_size']}; always "
            f"guessing the commonest class gives {100 * first['majority_accuracy']:.1f} %.",
            "",
            markdown(["mixer", "seeds", "parameters", "test accuracy, %", "ms per step", "peak memory, GiB"], found),
            "",
        ]
    return "\n".join(lines)


def plot(rows: dict[str, dict]):
    """Accuracy and time per step, a column per task, of the contenders that all tasks have."""
    tasks = by_task(rows)
    common = [name for name in CONTENDERS if all(name in contenders for contenders in tasks.values())]
    size = (1.8 + 3.4 * len(tasks), 0.64 * len(common) + 1.4)
    figure, axes = pyplot().subplots(2, len(tasks), figsize=size, squeeze=False, sharey="col")
    places, colours = range(len(common)), [COLOURS.get(CONTENDERS[name][0], GREY) for name in common]
    for column, (task, contenders) in enumerate(tasks.items()):
        for axis, values, form, title in (
            (axes[0, column], accuracies, "{:.1f}", "test accuracy, %"),
            (axes[1, column], milliseconds, "{:.0f}", "milliseconds per training step"),
        ):
            own = [values(contenders[name]) for name in common]
            numbers = [statistics.mean(x) for x in own]
            spreads = [statistics.stdev(x) if len(x) > 1 else 0 for x in own]
            style = {"xerr": spreads, "ecolor": "#888888"} if any(spreads) else {}
            bars = axis.barh(places, numbers, color=colours, height=0.7, **style)
            axis.bar_label(bars, [form.format(number) for number in numbers], padding=4, fontsize=9)
            axis.set_xlim(0, 1.15 * (max(numbers) + max(spreads)))
            axis.set_xlabel(title, fontsize=9)
            axis.set_yticks(places, [TITLES[name] for name in common], fontsize=9)
            axis.tick_params(axis="y", length=0, labelleft=column == 0)
            axis.tick_params(axis="x", labelsize=8)
            axis.spines[["top", "right", "left"]].set_visible(False)
        majority = 100 * contenders[common[0]][0]["majority_accuracy"]
        axes[0, column].axvline(majority, color="#888888", linewidth=1, linestyle=":")
        axes[0, column].set_title(TASKS[task].title, fontsize=10)
        axes[0, column].invert_yaxis()
    axes[0, 0].set_title(f"{axes[0, 0].get_title()}\n(dotted: always the commonest class)", fontsize=10)
    figure.tight_layout()
    return figure


def wanted_rows(arguments: argparse.Namespace) -> dict[str, Row]:
    """By name, what trains and tests a row."""
    names = {"num_hidden_layers": "layers", "num_attention_heads": "heads", "num_components": "components"}
    names |= {name: name for name in ("hidden_size", "intermediate_size")}
    sizes = {field: getattr(arguments, name) for field, name in names.items()}
    rows = {}

    @cache
    def splits(task: str) -> dict[str, Examples]:
        return data.load(task, arguments.prepared, arguments.listops_sizes, arguments.listops_lengths)

    def row(task: str, contender: str, seed: int, recipe: dict) -> dict:
        return run(task, contender, seed, recipe, splits(task), arguments.compile)

    wanted = itertools.product(arguments.tasks, arguments.seeds, arguments.contenders, arguments.rates)
    for task, seed, contender, rate in wanted:
        recipe = {
            "steps": arguments.steps or TASKS[task].steps, "batch_size": arguments.batch_size, "learning_rate": rate,
            "weight_decay": 0.05, "dropout": TASKS[task].dropout, "sizes": sizes,
        }  # fmt: skip
        name = f"{task}, {contender}, seed {seed}" + ("" if rate == RATE else f", rate {rate:g}")
        rows[name] = Row(partial(row, task, contender, seed, recipe), recipe)
    return rows


def add_options(add) -> None:
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--contenders", nargs="+", choices=list(CONTENDERS), default=DEFAULT_CONTENDERS)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, help="of every task instead of its own number")
    add("--batch_size", type=int, default=32, help="examples per step")
    add("--rates", type=float, nargs="+", default=[RATE], help="learning rates of every mixer")
    add("--hidden_size", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--components", type=int, default=64)
    add("--intermediate_size", type=int, default=704, help="of the softmax model")
    add("--listops_sizes", type=int, nargs=3, default=[96_000, 2000, 2000], help="train, valid, test")
    add("--listops_lengths", type=int, nargs=2, default=[500, 2000], help="between these, exclusive")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="the blocks")
    add_run_options(add)


def main() -> None:
    name = "long_context_classification"

    def run(options: argparse.Namespace) -> None:
        run_rows(Results(options.output, name, {}), wanted_rows(options), options)

    def prepare(options: argparse.Namespace) -> None:
        data.prepare(options.data, options.prepare)

    command(__doc__, name, add_options, run, lambda x: table(x["rows"]), lambda x: plot(x["rows"]), prepare=prepare)


if __name__ == "__main__":
    main()
