# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables and figures of the rows of recall.py."""

import statistics
from collections.abc import Iterable
from itertools import takewhile

from benchmarks.lib.tables import markdown, of_best_rate, pyplot


RECALLED = 0.9  # the accuracy from which something counts as recalled
SUMMARY = ((256, 64), (512, 128))  # tokens and pairs
COLUMNS = ["width", "mixer", "parameters", "state", "state per layer", "seeds x rates"]


def best_rows(rows: Iterable[dict], experiment: str) -> dict[tuple[int, str], dict]:
    """
    By width and title: `accuracy`, `{(length, pairs or depth): accuracy}`, of the learning rate that is best in the mean over the
    seeds, the accuracy of its worst seed, and what one of its rows says.
    """
    rows = [row for row in rows if row["recipe"]["experiment"] == experiment]

    def key(row: dict) -> tuple[int, str]:
        return row["recipe"]["width"], row["title"]

    def rate(row: dict) -> float:
        return row["recipe"]["learning_rate"]

    def score(own: list[dict]) -> float:
        return statistics.mean(accuracy for row in own for _, _, accuracy in row["accuracy"])

    best = {}
    for name, own in of_best_rate(rows, key, rate, score).items():
        cells = {(a, b): [row["accuracy"][i][2] for row in own] for i, (a, b, _) in enumerate(own[0]["accuracy"])}
        best[name] = {
            **own[0], "accuracy": {cell: statistics.mean(values) for cell, values in cells.items()},
            "worst": {cell: min(values) for cell, values in cells.items()}, "seeds": len(own),
            "rates": len({rate(row) for row in rows if key(row) == name}),
        }  # fmt: skip
    return dict(sorted(best.items(), key=lambda item: item[0][0]))


def by_mixer(best: dict[tuple[int, str], dict], columns: list[str], cells) -> str:
    """A line a contender: mixer, parameters, state of all layers and of one, seeds and rates, and its cells."""
    lines = []
    for (width, title), row in best.items():
        layers, state = int(row.get("contender", ":1").split(":")[1]), row["state_size"]
        states = ["grows"] * 2 if state is None else [f"{state:,}", f"{state // layers:,}"]
        seeds = f"{row['seeds']} x {row['rates']}"
        lines.append([str(width), title, f"{row['parameters'] / 1e6:.2f} M", *states, seeds, *cells(row)])
    return markdown([*COLUMNS, *columns], lines).replace("|---|---:|", "|---:|---|", 1)


def tables(rows: dict[str, dict]) -> str:
    """Both experiments as Markdown."""
    lines = []
    if best := best_rows(rows.values(), "recall"):
        segments = list(next(iter(best.values()))["accuracy"])
        spread = ", mean over the seeds (worst seed)." if any(row["seeds"] > 1 for row in best.values()) else "."
        columns = [*(f"{b} @ {a}" for a, b in segments), f"pairs at {RECALLED:.0%}"]

        def scores(row: dict) -> list[str]:
            return [*(recall_cell(row, segment) for segment in segments), str(most_pairs(row["accuracy"]))]

        title = f"Multi-query associative recall: accuracy in % by key-value pairs @ length{spread}"
        lines += [title, "", by_mixer(best, columns, scores), ""]
    if best := best_rows(rows.values(), "needle"):
        first = next(iter(best.values()))
        lengths = list(dict.fromkeys(length for length, _ in first["accuracy"]))

        def depths(row: dict) -> list[str]:
            parts = [[x for (a, _), x in row["accuracy"].items() if a == length] for length in lengths]
            return [f"{100 * statistics.mean(part):.0f} / {100 * min(part):.0f}" for part in parts]

        title = (
            f"Needle in a haystack of {first['recipe']['facts']} facts: accuracy in %, mean over the depths / at the worst depth, "
            f"by length. Trained on up to {max(first['recipe']['train_lengths']):,} tokens."
        )
        lines += [title, "", by_mixer(best, [f"{length:,}" for length in lengths], depths), ""]
    return "\n".join(lines)


def summary(rows: dict[str, dict]) -> str:
    """Recall of every block at the two sizes that the README shows, the best first."""
    best = {title: row["accuracy"] for (_, title), row in best_rows(rows.values(), "recall").items()}
    lines = [
        [title.removesuffix(", 2 layers"), *(f"{100 * accuracy[segment]:.1f} %" for segment in SUMMARY)]
        for title, accuracy in sorted(best.items(), key=lambda item: -item[1][SUMMARY[0]])
    ]
    return markdown(["block", *(f"{pairs} pairs in {length} tokens" for length, pairs in SUMMARY)], lines)


def recall_cell(row: dict, segment: tuple) -> str:
    worst = f" ({100 * row['worst'][segment]:.1f})" if row["seeds"] > 1 else ""
    return f"{100 * row['accuracy'][segment]:.1f}{worst}"


def most_pairs(accuracy: dict) -> int | str:
    """The largest number of pairs that is recalled, as are all smaller ones."""
    recalled = [pairs for (_, pairs), _ in takewhile(lambda item: item[1] >= RECALLED, accuracy.items())]
    return recalled[-1] if recalled else "none"


def plot(rows: dict[str, dict]) -> dict:
    """The figures that the rows suffice for, by name; the greatest width of each experiment."""
    figures = {}
    for experiment, draw in (("recall", recall_figure), ("needle", needle_figure)):
        if best := best_rows(rows.values(), experiment):
            widest = max(width for width, _ in best)
            figures[experiment] = draw({title: row for (width, title), row in best.items() if width == widest}, widest)
    return figures


def recall_figure(best: dict[str, dict], width: int):
    """Accuracies as a table in colours, a line per contender and a column per number of pairs."""
    segments = list(next(iter(best.values()))["accuracy"])
    values = [[100 * row["accuracy"][segment] for segment in segments] for row in best.values()]
    figure, axis = pyplot().subplots(figsize=(4.2 + 0.75 * len(segments), 1.3 + 0.34 * len(best)))
    heat(axis, values)
    axis.set_xticks(range(len(segments)), [f"{b}\n{a:,}" for a, b in segments], fontsize=9)
    axis.set_yticks(range(len(best)), list(best), fontsize=9)
    axis.set_xlabel("key-value pairs, below them the length", fontsize=9)
    axis.set_title(f"Multi-query associative recall, width {width}: accuracy in %", fontsize=10)
    figure.tight_layout()
    return figure


def needle_figure(best: dict[str, dict], width: int):
    """Accuracy by length and depth, a map per contender."""
    columns = min(3, len(best))
    lines = -(-len(best) // columns)
    figure, axes = pyplot().subplots(lines, columns, figsize=(3.5 * columns, 0.6 + 2.5 * lines), squeeze=False)
    for axis in axes.flat[len(best) :]:
        axis.set_visible(False)
    for index, (axis, (title, row)) in enumerate(zip(axes.flat, best.items(), strict=False)):
        lengths = list(dict.fromkeys(length for length, _ in row["accuracy"]))
        depths = list(dict.fromkeys(depth for _, depth in row["accuracy"]))
        heat(axis, [[100 * row["accuracy"][length, depth] for length in lengths] for depth in depths], size=6)
        trained = sum(length <= max(row["recipe"]["train_lengths"]) for length in lengths)
        axis.axvline(trained - 0.5, color="#d1495b", linewidth=2)
        axis.set_title(title.replace(": ", ":\n", 1) if len(title) > 36 else title, fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        shown = range(0, len(depths), max(1, len(depths) // 5))
        axis.set_yticks(shown, [f"{depths[i]:.0%}" for i in shown], fontsize=7)
        if index % columns == 0:
            axis.set_ylabel("depth of the fact", fontsize=8)
        if index + columns >= len(best):
            axis.set_xlabel("length", fontsize=8)
    figure.suptitle(
        f"Needle in a haystack, width {width}: accuracy in %. Right of the red line: longer than in training.",
        fontsize=10,
    )
    figure.tight_layout()
    return figure


def heat(axis, values: list[list[float]], size: int = 9) -> None:
    """Numbers from 0 to 100 on a ground that darkens with them."""
    axis.imshow(values, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            colour = "white" if value > 60 else "#111111"
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
