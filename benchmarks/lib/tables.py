# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How results are shown: tables in Markdown and in plain text, colours, figures."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


# One colour per mixer, the same in every figure: GMA in blue, softmax in black, the rivals between; others are grey
GREY = "#9e9e9e"
COLOURS = {
    "softmax": "#222222", "softmax_gated": "#777777", "elu": "#b8860b", "linear_gated": "#dcc385", "performer": "#c2571a",
    "linformer": "#d1495b", "mamba2": "#2e7d4f", "gated_delta_net": "#97c9a8", "gma_paper": "#7fb2e5",
    "gma_paper_wide": "#b5d3f0", "gma_gated": "#1f5fa8", "gma_correlated": "#0b2f66", "hybrid": "#6a4fb3",
}  # fmt: skip


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown, the first `left` columns to the left and the others to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def pivot(title: str, columns: Iterable, names: dict, cells: dict[tuple, str]) -> list[str]:
    """A table in plain text of `cells[name, column]`, without empty lines; none at all if nothing is left."""
    columns = [*columns]
    rows = [[shown, *(cells.get((name, column), "") for column in columns)] for name, shown in names.items()]
    rows = [["", *map(str, columns)], *(row for row in rows if any(row[1:]))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:<{widths[0]}}" + "".join(f"{cell:>{n + 2}}" for cell, n in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return ["\n".join([title, *lines])] if len(rows) > 1 else []


def of_best_rate(rows: Iterable[dict], key: Callable, rate: Callable, score: Callable) -> dict:
    """The rows that differ in nothing but the seed, together, by `key(row)`: of several learning rates those of the largest `score`."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), {}).setdefault(rate(row), []).append(row)
    return {name: max(by_rate.values(), key=score) for name, by_rate in groups.items()}


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """`24.10 ± 0.20`: the mean over the seeds and their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def pyplot():
    """Matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def clean(*axes) -> None:
    """No frame but the lines that carry numbers."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def label_ends(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names beside the ends of lines, each end its last x and y, name and colour. Names that would overlap move apart."""
    axis.figure.canvas.draw()  # the axes have their place from here on
    height, gap = axis.bbox.height, 1.25 * 9 * axis.figure.dpi / 72
    ends = sorted(ends, key=lambda end: end[1])
    places = [axis.transData.transform((x, y))[1] - axis.bbox.y0 for x, y, _, _ in ends]
    for _ in range(200):  # neighbours push each other apart, a little each time
        for i in range(len(places) - 1):
            overlap = max(0, gap - (places[i + 1] - places[i]))
            places[i] -= overlap / 2
            places[i + 1] += overlap / 2
    for (x, y, name, colour), place in zip(ends, places, strict=True):
        axis.annotate(
            name, xy=(x, y), xytext=(1.04, place / height), textcoords="axes fraction", fontsize=9, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8}, annotation_clip=False,
        )  # fmt: skip


def save_figure(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")
    pyplot().close(figure)
    print(f"written to {path}")
