# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Draws figures/concept.png: keys write to the components of a mixture, a query reads them back."""

from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Ellipse


COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52"]
MEANS = np.array([[-1.7, 0.9], [0.2, 1.5], [1.8, 0.2], [-0.4, -1.1]])
DEVIATIONS = np.array([[0.75, 0.5], [0.6, 0.55], [0.55, 0.8], [0.9, 0.5]])


def responsibilities(x: np.ndarray) -> np.ndarray:
    """gamma_c(x) for points x [n, 2] and equal priors."""
    squares = ((x[:, None] - MEANS) / DEVIATIONS) ** 2
    logits = -0.5 * (squares + 2 * np.log(DEVIATIONS)).sum(axis=-1)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def main() -> None:
    generator = np.random.default_rng(3)
    component = generator.integers(0, 4, 26)
    keys = MEANS[component] + DEVIATIONS[component] * generator.normal(size=(26, 2)) * 0.8
    query = np.array([[0.75, 0.95]])
    figure, (space, written, read) = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1.25, 1.1, 0.8])

    for mean, deviation, colour in zip(MEANS, DEVIATIONS, COLOURS, strict=True):
        for scale, alpha in ((2, 0.25), (4, 0.12)):
            space.add_patch(Ellipse(mean, *(scale * deviation), color=colour, alpha=alpha, linewidth=0))
    space.scatter(
        *keys.T, s=26, color=responsibilities(keys) @ np.array([matplotlib.colors.to_rgb(c) for c in COLOURS])
    )
    space.scatter(*query.T, s=130, marker="*", color="black", zorder=3)
    space.annotate("query", query[0], (8, 6), textcoords="offset points")
    space.set_title("1. Route keys and queries\nto the components of one mixture", fontsize=10)
    space.set(xticks=[], yticks=[], xlim=(-3.6, 3.3), ylim=(-2.4, 3.0))

    order = np.argsort(component)
    shown = responsibilities(keys)[order].T
    written.imshow(shown, aspect="auto", cmap="Greys", vmin=0, vmax=1)
    written.set_title("2. Each key writes its value\nto the slots, in these shares", fontsize=10)
    written.set(xticks=[], xlabel="keys (tokens)")
    written.set_yticks(range(4), [f"slot {c + 1}" for c in range(4)])
    for label, colour in zip(written.get_yticklabels(), COLOURS, strict=True):
        label.set_color(colour)

    read.barh(range(4), responsibilities(query)[0], color=COLOURS)
    read.set(yticks=[], ylim=(3.5, -0.5), xlim=(0, 1), xlabel="share of the read")
    read.set_title("3. The query reads the slots\nin its own shares", fontsize=10)
    for axis in (written, read):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "concept.png", dpi=130)


if __name__ == "__main__":
    main()
