# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The tables and the figure of `responsibilities.py`, from its JSON file."""

import statistics

from benchmarks.lib.tables import clean, markdown, pyplot


ROLES = ("keys", "queries")
COLOURS = {"keys": "#1f5fa8", "queries": "#c2571a"}
MARKERS = {"keys": "o", "queries": "s"}
COLUMNS = ["layer", "", "components in use", "fewest and most", "dead"]
COLUMNS += [cell for name in ("NMI", "purity") for cell in (name, "untrained", "shuffled")]


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
    title = (
        f"The best aligned head (layer {best['layer']}, head {best['head']}, {best['role']}: NMI "
        f"{part[best['role']]['nmi'][best['head']]:.3f}); for every category of at least 1% of the tokens, the component that "
        "comes closest to it (most tokens in both, of those in either), and the tokens which that component prefers:"
    )
    columns = [
        "category",
        "of all tokens",
        "component",
        "takes of the category",
        "of the component's tokens",
        "prefers",
    ]
    lines = []
    for found in best["components"]:
        tokens = ", ".join(f"<code>{escaped(token)}</code>" for token in found["tokens"])
        share = row["categories"][found["category"]] / row["num_tokens"]
        shares = [f"{found[name]:.0%}" for name in ("share_of_category", "share_of_component")]
        lines.append([found["category"], f"{share:.0%}", str(found["component"]), *shares, tokens])
    return f"{title}\n\n" + markdown(columns, lines).replace("---:|\n", "---|\n", 1)


def escaped(token: str) -> str:
    """A token as a cell of a Markdown table can hold it."""
    special = {char: f"&#{ord(char)};" for char in "&<>|*_`[]\\~"}
    return "".join(special.get(char, char) for char in token)


def plot(report: dict):
    """Components in use, and alignment with the surface categories, of every head by layer."""
    trained, untrained = report["rows"]["trained"], report["rows"]["untrained"]
    labels, count = [part["layer"] for part in trained["layers"]], trained["num_components"]
    places = range(len(labels))

    def mean_of(row: dict, name: str) -> list[float]:
        both = [[value for role in ROLES for value in heads(row, role, name, layer)] for layer in places]
        return [statistics.mean(values) for values in both]

    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, name in zip(panels, ("usage_perplexity", "nmi"), strict=True):
        for shift, role in ((-0.13, "keys"), (0.13, "queries")):
            values = [heads(trained, role, name, layer) for layer in places]
            style = {"color": COLOURS[role], "marker": MARKERS[role]}
            for layer, own in enumerate(values):
                x = [layer + shift] * len(own)
                axes.plot(x, own, linestyle="", alpha=0.45, markersize=4.5, markeredgewidth=0, **style)
            means = [statistics.mean(own) for own in values]
            axes.plot([layer + shift for layer in places], means, markersize=6.5, label=f"{role}, mean", **style)
        axes.plot(mean_of(untrained, name), "-", color="#444444", linewidth=1.3, label="before training, mean")
        axes.set_xticks(places, labels)
        axes.set_xlabel("layer")
        clean(axes)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    left, right = panels
    left.axhline(count, color="#8a8a8a", linestyle="--", label=f"all {count} alike")
    left.set(ylim=(0, 1.06 * count), ylabel="usage perplexity of a head")
    left.set_title("Components in use, one mark per head", loc="left", fontsize=11)
    right.plot(mean_of(trained, "nmi_shuffled"), "--", color="#8a8a8a", label="categories shuffled, mean")
    right.set(ylim=(0, None), ylabel="normalised mutual information")
    right.set_title("Alignment with surface categories of tokens", loc="left", fontsize=11)
    for axes in panels:
        # Below the panel, where it hides no head
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure
