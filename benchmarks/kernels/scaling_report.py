# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The tables and the figure of `scaling.py`, from its JSON file."""

import math
from pathlib import Path

from benchmarks.lib.tables import COLOURS, clean, markdown, pyplot, save_figure


FITTED_POINTS = 4  # the slope is that of the longest lengths: short ones show the costs of launching
# As in the other figures, and lighter for another program of the same operator
RIVAL_COLOURS = {
    "GMA, paper": COLOURS["gma_paper"],
    "GMA, gated": COLOURS["gma_gated"],
    "softmax (SDPA)": COLOURS["softmax"],
    "softmax (FlashAttention-2)": COLOURS["softmax_gated"],
    "linear attention": COLOURS["elu"],
    "linear attention, fla": "#dcc385",
    "Mamba-2": COLOURS["mamba2"],
    "Mamba-2, fla": "#97c9a8",
}


# Programs in plain PyTorch, which fused ones would outdo
TITLES = {name: f"{name} (plain PyTorch)" for name in ("linear attention", "Mamba-2")}


def points(report: dict, name: str, part: str, field: str) -> dict[int, float]:
    """What was measured of a rival: by length, a number."""
    rows = [row for row in report["rows"].values() if (row["rival"], row["pass"]) == (name, part)]
    return {row["length"]: row[field] for row in sorted(rows, key=lambda row: row["length"]) if field in row}


def slope(measured: dict[int, float]) -> float | None:
    """
    The exponent of the growth: least squares of log value against log length, over the longest lengths. None with fewer than
    three points.
    """
    lengths = sorted(measured)[-FITTED_POINTS:]
    if len(lengths) < 3:
        return None
    x = [math.log(length) for length in lengths]
    y = [math.log(measured[length]) for length in lengths]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def rivals_of(report: dict) -> list[str]:
    """The rivals of which anything was measured, in the order of the results."""
    return list(dict.fromkeys(row["rival"] for row in report["rows"].values() if "ms" in row))


def tokens(length: int) -> str:
    return f"{length // 2**20}M" if length >= 2**20 else f"{length // 2**10}k" if length >= 2**10 else str(length)


def shown(value: float | None, form: str = ",.4g") -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:{form}}" if value >= 10 else f"{value:.2g}"


def table(report: dict, part: str = "forward_backward", field: str = "ms") -> str:
    """A line per length, a column per rival, and the fitted exponents below; an empty cell was refused."""
    names = rivals_of(report)
    values = {name: points(report, name, part, field) for name in names}
    lengths = sorted({length for measured in values.values() for length in measured})
    lines = [[tokens(length), *(shown(values[name].get(length), ".3g") for name in names)] for length in lengths]
    slopes = [slope(values[name]) for name in names]
    lines.append(["exponent", *("" if exponent is None else f"{exponent:.2f}" for exponent in slopes)])
    return markdown(["tokens", *(TITLES.get(name, name) for name in names)], lines, left=0)


def tables(report: dict) -> str:
    """Time and memory of both passes."""
    titles = {
        ("forward_backward", "ms"): "Forward and backward pass, milliseconds:",
        ("forward", "ms"): "Forward pass alone, milliseconds:",
        ("forward_backward", "peak_mib"): "Peak memory of forward and backward pass, MiB:",
        ("forward", "peak_mib"): "Peak memory of the forward pass alone, MiB:",
    }
    return "\n\n".join(f"{title}\n\n{table(report, *what)}" for what, title in titles.items())


def plot(report: dict, path: Path) -> None:
    """Two log-log panels, forward and backward: time and peak memory, with the name and the exponent at each line's end."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = rivals_of(report)
    figure, axes = pyplot().subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    for axis, (field, heading, unit) in zip(
        axes,
        (("ms", "Time of forward and backward pass", "milliseconds"), ("peak_mib", "Peak memory", "MiB")),
        strict=True,
    ):
        for name in names:
            measured = points(report, name, "forward_backward", field)
            if measured:
                exponent, title = slope(measured), TITLES.get(name, name)
                label = title if exponent is None else f"{title}  (N^{exponent:.2f})"
                x, y = list(measured), list(measured.values())
                axis.plot(x, y, "o-", color=RIVAL_COLOURS[name], markersize=3.5, linewidth=1.7, label=label)
        axis.set(xscale="log", yscale="log", title=heading, xlabel="tokens", ylabel=unit)
        lengths = sorted({row["length"] for row in report["rows"].values()})
        axis.xaxis.set_major_locator(FixedLocator(lengths[::2]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))
        axis.grid(True, color="#e4e4e4", linewidth=0.6)
        clean(axis)
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{report['setting']['device']}, {report['setting']['dtype']}, batch 1, width 512", fontsize=10, color="#555"
    )
    save_figure(figure, path)
