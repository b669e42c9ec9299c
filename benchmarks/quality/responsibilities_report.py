# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The tables and the figure of `responsibilities.py`, from its JSON file."""

import statistics
from pathlib import Path

from benchmarks.lib.tables import clean, markdown, pyplot, save_figure


ROLES = ("keys", "queries")
COLOURS = {"keys": "#1f5fa8", "queries": "#c2571a"}
MARKERS = {"keys": "o", "queries": "s"}
COLUMNS = (
    "layer",
    "",
    "components in use",
    "fewest and most",
    "dead",
    "NMI",
    "untrained",
    "shuffled",
    "purity",
    "untrained",
    "shuffled",
)


def heads(row: dict, role: str, name: str, layer: int | None = None) -> list[float]:
    """A number of every head, of one layer or of all."""
    layers = row["layers"] if layer is None else [row["layers"][layer]]
    return [value for part in layers for value in part[role][name]]


def table(report: dict) -> str:
    """Markdown: usage and alignment by layer, means over the heads; below it what the best aligned head tells apart."""
    trained, untrained = report["rows"]["trained"], report["rows"]["untrained"]
    lines = []
    places = [*((part["layer"], index) for index, part in enumerate(trained["layers"])), ("all", None)]
    for label, layer in places:
        for role in ROLES:
            usage, dead = (heads(trained, role, name, layer) for name in ("usage_perplexity", "dead_components"))
            cells = [label, role, f"{statistics.mean(usage):.1f}", f"{min(usage):.1f} to {max(usage):.1f}"]
            cells.append(f"{sum(dead)} of {trained['num_components'] * len(dead)}")
            for name in ("nmi", "purity"):
                found = ((trained, name), (untrained, name), (trained, f"{name}_shuffled"))
                cells += [f"{statistics.mean(heads(row, role, key, layer)):.3f}" for row, key in found]
            lines.append(cells)
    return "\n".join([markdown(COLUMNS, lines, left=2), "", legend(trained, untrained), "", best_head(trained)])


def legend(trained: dict, untrained: dict) -> str:
    """What the table shows, and the numbers that it is to be read beside."""
    count = trained["num_components"]
    largest, margins, entropies, before = (
        statistics.mean(value for role in ROLES for value in heads(row, role, name))
        for row, name in (
            (trained, "nmi_largest"),
            (trained, "median_margin"),
            (trained, "entropy"),
            (untrained, "usage_perplexity"),
        )
    )
    return (
        f"Means over the heads of a layer. *Components in use*: the usage perplexity, {count} if all are used alike; before "
        f"training it is {before:.1f}. *Dead*: less than a tenth of an equal share. Components that told the categories apart "
        f"without fault would have an NMI of {largest:.2f}, not 1, for there are more of them than categories. Mean entropy of "
        f"the responsibilities of a token: {entropies:.2f} nats; median margin between its two largest logits: {margins:.2f}."
    )


def best_head(row: dict) -> str:
    """For every frequent category, the component of the best aligned head that comes closest to it."""
    best = row["best_aligned"]
    part = next(part for part in row["layers"] if part["layer"] == best["layer"])
    lines = [
        f"The best aligned head (layer {best['layer']}, head {best['head']}, {best['role']}: NMI "
        f"{part[best['role']]['nmi'][best['head']]:.3f}); for every category of at least 1% of the tokens, the component that "
        "comes closest to it (most tokens in both, of those in either), and the tokens which that component prefers:",
        "",
        "| category | of all tokens | component | takes of the category | of the component's tokens | prefers |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for found in best["components"]:
        tokens = ", ".join(f"<code>{escaped(token)}</code>" for token in found["tokens"])
        share = row["categories"][found["category"]] / row["num_tokens"]
        lines.append(
            f"| {found['category']} | {share:.0%} | {found['component']} | {found['share_of_category']:.0%} | "
            f"{found['share_of_component']:.0%} | {tokens} |"
        )
    return "\n".join(lines)


def escaped(token: str) -> str:
    """A token as a cell of a Markdown table can hold it."""
    special = {char: f"&#{ord(char)};" for char in "&<>|*_`[]\\~"}
    return "".join(special.get(char, char) for char in token)


def plot(report: dict, path: Path) -> None:
    """Components in use, and alignment with the surface categories, of every head by layer."""
    trained, untrained = report["rows"]["trained"], report["rows"]["untrained"]
    labels = [part["layer"] for part in trained["layers"]]
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, name in zip(panels, ("usage_perplexity", "nmi"), strict=True):
        for shift, role in ((-0.13, "keys"), (0.13, "queries")):
            means = []
            for layer in range(len(labels)):
                values = heads(trained, role, name, layer)
                means.append(statistics.mean(values))
                axes.plot(
                    [layer + shift] * len(values),
                    values,
                    MARKERS[role],
                    color=COLOURS[role],
                    alpha=0.45,
                    markersize=4.5,
                    markeredgewidth=0,
                )
            places = [layer + shift for layer in range(len(labels))]
            axes.plot(places, means, MARKERS[role] + "-", color=COLOURS[role], markersize=6.5, label=f"{role}, mean")
        both = [
            statistics.mean(value for role in ROLES for value in heads(untrained, role, name, layer))
            for layer in range(len(labels))
        ]
        axes.plot(both, "-", color="#444444", linewidth=1.3, label="before training, mean")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("layer")
        clean(axes)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    left, right = panels
    count = trained["num_components"]
    left.axhline(count, color="#8a8a8a", linestyle="--", label=f"all {count} alike")
    left.set_ylim(0, 1.06 * count)
    left.set_ylabel("usage perplexity of a head")
    left.set_title("Components in use, one mark per head", loc="left", fontsize=11)
    shuffled = [
        statistics.mean(value for role in ROLES for value in heads(trained, role, "nmi_shuffled", layer))
        for layer in range(len(labels))
    ]
    right.plot(shuffled, "--", color="#8a8a8a", label="categories shuffled, mean")
    right.set_ylim(bottom=0)
    right.set_ylabel("normalised mutual information")
    right.set_title("Alignment with surface categories of tokens", loc="left", fontsize=11)
    for axes in panels:
        # Below the panel, where it hides no head
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save_figure(figure, path)
