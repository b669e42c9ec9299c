# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The tables and the figure of `scaling.py`, from its JSON file."""

import math
import statistics

from benchmarks.lib.tables import COLOURS, clean, markdown, pyplot
from benchmarks.rivals import operators


FITTED_POINTS = 4  # the slope is that of the longest lengths: short ones show the costs of launching
# The operator, and its colour: as in the other figures, and lighter for another program of the same operator
SHOWN = {
    "GMA, paper": ("GMA normalised", COLOURS["gma_paper"]),
    "GMA, gated": ("GMA un-normalised, decay", COLOURS["gma_gated"]),
    "softmax (SDPA)": ("SDPA", COLOURS["softmax"]),
    "softmax (FlashAttention-2)": ("SDPA flash", COLOURS["softmax_gated"]),
    "linear attention": ("linear attention", COLOURS["elu"]),
    "Mamba-2": ("Mamba-2", COLOURS["mamba2"]),
    "linear attention, fla": ("fla chunk_linear_attn", "#dcc385"),
    "Mamba-2, fla": ("Mamba-2, fla", "#97c9a8"),
}
RIVALS = {title: operators.RIVALS[name] for title, (name, _) in SHOWN.items()}
# Programs in plain PyTorch, which fused ones would outdo
TITLES = {name: f"{name} (plain PyTorch)" for name in ("linear attention", "Mamba-2")}


def points(report: dict, name: str, part: str, field: str) -> dict[int, float]:
    """What was measured of a rival: by length, a number."""
    rows = [row for row in report["rows"].values() if (row["rival"], row["pass"]) == (name, part)]
    return {row["length"]: row[field] for row in sorted(rows, key=lambda row: row["length"]) if field in row}


def slope(measured: dict[int, float]) -> float | None:
    """The exponent of the growth, by least squares of the logarithms at the longest lengths; None with fewer than three points."""
    lengths = sorted(measured)[-FITTED_POINTS:]
    if len(lengths) < 3:
        return None
    logarithms = ([math.log(x) for x in values] for values in (lengths, (measured[n] for n in lengths)))
    return statistics.linear_regression(*logarithms).slope


def rivals_of(report: dict) -> list[str]:
    """The rivals of which anything was measured, in the order of the results."""
    return list(dict.fromkeys(row["rival"] for row in report["rows"].values() if "ms" in row))


def tokens(length: int) -> str:
    return f"{length // 2**20}M" if length >= 2**20 else f"{length // 2**10}k" if length >= 2**10 else str(length)


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"


def table(report: dict, part: str = "forward_backward", field: str = "ms") -> str:
    """A line per length, a column per rival, and the fitted exponents below; an empty cell was refused."""
    names = rivals_of(report)
    values = {name: points(report, name, part, field) for name in names}
    lengths = sorted({length for measured in values.values() for length in measured})
    lines = [[tokens(length), *(shown(values[name].get(length)) for name in names)] for length in lengths]
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


def plot(report: dict):
    """Two log-log panels, forward and backward: time and peak memory, with the name and the exponent at each line's end."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panels = (("ms", "Time of forward and backward pass", "milliseconds"), ("peak_mib", "Peak memory", "MiB"))
    lengths = sorted({row["length"] for row in report["rows"].values()})
    figure, axes = pyplot().subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    for axis, (field, heading, unit) in zip(axes, panels, strict=True):
        for name in rivals_of(report):
            if measured := points(report, name, "forward_backward", field):
                exponent, title = slope(measured), TITLES.get(name, name)
                label = title if exponent is None else f"{title}  (N^{exponent:.2f})"
                style = {"color": SHOWN[name][1], "markersize": 3.5, "linewidth": 1.7, "label": label}
                axis.plot(list(measured), list(measured.values()), "o-", **style)
        axis.set(xscale="log", yscale="log", title=heading, xlabel="tokens", ylabel=unit)
        axis.xaxis.set_major_locator(FixedLocator(lengths[::2]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))
        axis.grid(True, color="#e4e4e4", linewidth=0.6)
        clean(axis)
        axis.legend(frameon=False, fontsize=9)
    setting = report["setting"]
    figure.suptitle(f"{setting['device']}, {setting['dtype']}, batch 1, width 512", fontsize=10, color="#555")
    return figure
