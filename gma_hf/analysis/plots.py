# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of a report, for notebooks and for the HTML page. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .report import MARGIN_SHARES, LayerReport, RoleReport, RoutingReport, TokenRoute
from .statistics import DEAD_SHARE
from .text import CATEGORY_NAMES


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The contrast is at least 3:1 against a white page and against a dark page
COLORS = {"keys": "#2f7fd0", "queries": "#c4621c", "control": "#7d858f"}
MARKERS = {"keys": "o", "queries": "s"}
ROLES = ("keys", "queries")
MAX_LABELLED = 40  # largest number of heads or tokens with labels


def import_pyplot():
    """The module `matplotlib.pyplot`, or an error that says how to install matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed: pip install matplotlib") from error
    return pyplot


def plot_usage(report: RoutingReport, role: str = "keys") -> Figure:
    """
    How evenly each head uses its components: the shares of the components, the largest first, and the usage perplexity.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].
        role (`str`, *optional*, defaults to `"keys"`): `"keys"` (which components tokens write to) or `"queries"` (which
            components tokens read from).

    Returns:
        `matplotlib.figure.Figure`: the figure.
    """
    pyplot = import_pyplot()
    from matplotlib.colors import LogNorm

    statistics = [getattr(layer, role).statistics for layer in report.layers]
    most = max(part.usage.shape[-1] for part in statistics)
    rows = [usage for part in statistics for usage in part.usage.sort(dim=-1, descending=True).values]
    shares = torch.full((len(rows), most), torch.nan, dtype=torch.float64)
    for row, usage in zip(shares, rows, strict=True):
        row[: len(usage)] = usage * len(usage)
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, _height(len(rows))), width_ratios=(3, 2), layout="constrained"
    )
    norm = LogNorm(DEAD_SHARE, max(most, 2), clip=True)
    image = left.imshow(shares.numpy(), aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    label = f"share, in equal shares 1 / C\n({DEAD_SHARE:g} or less: dead)"
    figure.colorbar(image, ax=left, label=label, location="bottom", format="%g")
    left.set_xlabel("components of a head, the most used first")
    left.set_ylabel("layer · head")
    left.set_title(f"Usage by {role}")
    _name_rows(left, [f"{layer.label} · {head}" for layer in report.layers for head in _heads(layer)])
    perplexities = torch.cat([part.usage_perplexity for part in statistics])
    right.plot(perplexities.tolist(), range(len(rows)), MARKERS[role], color=COLORS[role], linestyle="none")
    right.axvline(most, color=COLORS["control"], linestyle="--")
    right.set_xlim(0, most * 1.05)
    right.set_xlabel(f"usage perplexity (dashed: all {most} alike)")
    right.set_title("Effective components")
    right.grid(axis="x", alpha=0.2)
    return figure


def plot_entropy(report: RoutingReport) -> Figure:
    """
    How clearly tokens choose their components: mean entropy of the responsibilities by layer, one mark per head.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].

    Returns:
        `matplotlib.figure.Figure`: the figure.
    """
    figure, axes = _by_layer(report, lambda role: role.statistics.entropy)
    largest = max(layer.keys.statistics.usage.shape[-1] for layer in report.layers)
    axes.axhline(
        float(torch.tensor(largest).log()), color=COLORS["control"], linestyle="--", label="no routing, log C"
    )
    _from_zero(axes)
    axes.set_ylabel("entropy of responsibilities (nats)")
    axes.set_title("Entropy: 0 is hard routing")
    _legend(axes)
    return figure


def plot_margin(report: RoutingReport) -> Figure:
    """
    How far tokens are from changing their route: quantiles of the difference of the two largest logits, by layer.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].

    Returns:
        `matplotlib.figure.Figure`: the figure.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for shift, role in ((-0.12, "keys"), (0.12, "queries")):
        quantiles = torch.stack(
            [
                torch.stack([getattr(layer, role).statistics.margin_quantile(q).mean() for q in MARGIN_SHARES])
                for layer in report.layers
            ]
        )
        quantiles = quantiles.numpy()
        place = [index + shift for index in range(len(report.layers))]
        axes.vlines(place, quantiles[:, 0], quantiles[:, 4], color=COLORS[role], linewidth=1)
        axes.vlines(place, quantiles[:, 1], quantiles[:, 3], color=COLORS[role], linewidth=5, alpha=0.7)
        axes.plot(place, quantiles[:, 2], MARKERS[role], color=COLORS[role], label=role)
    _name_layers(axes, report)
    _from_zero(axes)
    axes.set_ylabel("margin (nats)")
    axes.set_title("Routing margin: median, 25 to 75 %, 5 to 95 % of the tokens (mean over heads)")
    axes.grid(axis="y", alpha=0.2)
    _legend(axes)
    return figure


def plot_stability(report: RoutingReport) -> Figure:
    """
    How much a small step can change responsibilities, and how much it does change them, by layer.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].

    Returns:
        `matplotlib.figure.Figure`: the figure.
    """
    pyplot = import_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    _by_layer(report, lambda role: role.statistics.stability_bound, panels[0])
    _by_layer(report, lambda role: role.statistics.sensitivity, panels[1])
    panels[0].set_title("Stability bound: largest spread of gradients")
    panels[1].set_title("Sensitivity: norm of the derivative")
    for axes in panels:
        _from_zero(axes)
        axes.set_ylabel("per unit of routing space")
    _legend(panels[1])
    return figure


def plot_alignment(report: RoutingReport) -> Figure:
    """
    How well components separate surface categories: NMI and purity by layer, beside the shuffled control.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].

    Returns:
        `matplotlib.figure.Figure`: the figure.
    """
    pyplot = import_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, measure, title in ((panels[0], "nmi", "Normalised mutual information"), (panels[1], "purity", "Purity")):
        _by_layer(report, lambda role, measure=measure: getattr(role.alignment, measure), axes)
        control = [float(getattr(layer.keys.alignment, f"{measure}_shuffled_mean").mean()) for layer in report.layers]
        spread = [float(getattr(layer.keys.alignment, f"{measure}_shuffled_std").mean()) for layer in report.layers]
        place = range(len(control))
        bars = {"fmt": "_", "markersize": 20, "markeredgewidth": 2, "color": COLORS["control"], "label": "shuffled"}
        axes.errorbar(place, control, yerr=[2 * s for s in spread], **bars)
        _from_zero(axes)
        axes.set_title(title)
    _legend(panels[1])
    return figure


def plot_categories(
    report: RoutingReport, layer: LayerReport | None = None, head: int | None = None, role: str = "keys"
) -> Figure:
    """
    What the components of one head specialised on: categories that are more frequent in a component than in the text.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].
        layer ([`LayerReport`], *optional*): the layer; by default the layer of the best aligned head.
        head (`int`, *optional*): number of the head; by default the best aligned head.
        role (`str`, *optional*, defaults to `"keys"`): `"keys"` or `"queries"`.

    Returns:
        `matplotlib.figure.Figure`: the figure.
    """
    pyplot = import_pyplot()
    if layer is None or head is None:
        layer, head = report.best_aligned(role)
    statistics = getattr(layer, role).statistics
    mass = statistics.category_mass[head] / statistics.num_tokens
    present = [index for index, share in enumerate(mass.sum(dim=0).tolist()) if share > 0]
    usage, joint = statistics.usage[head], mass[:, present]
    lift = (joint / (usage[:, None] * joint.sum(dim=0)).clamp(min=1e-12)).clamp(min=1 / 8, max=8).log2()
    shown = usage.argsort(descending=True)[:16]
    shown = shown[lift[shown].argmax(dim=1).argsort(stable=True)]
    labels = []
    for component in shown.tolist():
        tokens = "\u00a0 ".join(token for token, _, _ in report.top_tokens(layer, head, component, role, 4))
        labels.append(f"{tokens}\u00a0 \u00a0{component} ({usage[component]:.0%})")
    figure, axes = pyplot.subplots(figsize=(9, 1.9 + 0.28 * len(shown)), layout="constrained")
    image = axes.imshow(lift[shown].numpy(), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(present)), [CATEGORY_NAMES[index] for index in present], rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    axes.set_title(f"Layer {layer.label}, head {head}, {role}: top tokens, component (its share of all {role})")
    bar = figure.colorbar(image, ticks=range(-3, 4), label="how much likelier than in the text")
    bar.ax.set_yticklabels(["÷8", "÷4", "÷2", "1", "×2", "×4", "×8"])
    return figure


def plot_route(route: TokenRoute) -> Figure:
    """
    The route of one token: the most responsible component of each layer and head, and its responsibility.

    Args:
        route ([`TokenRoute`]): the result of [`Excerpt.route`].

    Returns:
        `matplotlib.figure.Figure`: the figure.
    """
    pyplot = import_pyplot()
    num_layers = len(route.labels)
    num_heads = max(len(values) for values in route.responsibilities["keys"] + route.responsibilities["queries"])
    figure, panels = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, 1.6 + 0.35 * min(num_layers, MAX_LABELLED)), layout="constrained"
    )
    for axes, role in zip(panels, ROLES, strict=True):
        strength = torch.full((num_layers, num_heads), torch.nan)
        for row, values in zip(strength, route.responsibilities[role], strict=True):
            row[: len(values)] = values
        image = axes.imshow(strength.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        for layer, components in enumerate(route.components[role] if num_heads <= MAX_LABELLED else []):
            for head, component in enumerate(components.tolist()):
                color = "black" if strength[layer, head] > 0.6 else "white"
                axes.text(head, layer, str(component), ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(num_heads)) if num_heads <= MAX_LABELLED else None
        axes.set_xlabel("head")
        title = axes.set_title(f"{'Writes to' if role == 'keys' else 'Reads from'} component, token “{route.token}”")
        title.set_parse_math(False)
    _name_rows(panels[0], route.labels)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="its responsibility")
    return figure


def plot_affinity(affinity: Tensor, tokens: list[str], title: str = "Implied attention") -> Figure:
    """
    The attention matrix that the mixture of a head implies. Every row is scaled to the sum 1.

    Args:
        affinity (`torch.Tensor` of shape `(length, length)`): the matrix of one head, from `output_attentions=True` or
            [`implied_affinity`].
        tokens (`list[str]`): the names of the tokens.
        title (`str`, *optional*, defaults to `"Implied attention"`): title of the figure.

    Returns:
        `matplotlib.figure.Figure`: the figure.

    Raises:
        ValueError: if the matrix does not have one row and one column per token.
    """
    pyplot = import_pyplot()
    from matplotlib.colors import PowerNorm

    if affinity.shape != (len(tokens), len(tokens)):
        raise ValueError(
            f"affinity has shape {list(affinity.shape)}, expected [length, length] = [{len(tokens)}, {len(tokens)}], the "
            "matrix of one head: select a row of the batch and a head."
        )
    weights = affinity.detach().float().cpu()
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    figure, axes = pyplot.subplots(figsize=(7.5, 6.8), layout="constrained")
    # Square roots, because most shares are small
    image = axes.imshow(weights.numpy(), cmap="viridis", norm=PowerNorm(0.5, vmin=0), interpolation="nearest")
    if len(tokens) <= 1.5 * MAX_LABELLED:
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7, parse_math=False)
    axes.set_xlabel("what is read")
    axes.set_ylabel("who reads")
    axes.set_title(title)
    figure.colorbar(image, label="share of what is read", shrink=0.8)
    return figure


def _by_layer(
    report: RoutingReport, values: Callable[[RoleReport], Tensor], axes: Axes | None = None
) -> tuple[Figure, Axes]:
    """One mark per head and role above the layers."""
    if axes is None:
        _, axes = import_pyplot().subplots(figsize=(9, 3.4), layout="constrained")
    for shift, role in ((-0.12, "keys"), (0.12, "queries")):
        heads = [values(getattr(layer, role)) for layer in report.layers]
        place = [index + shift for index, layer in enumerate(heads) for _ in layer]
        axes.plot(
            place,
            torch.cat(heads).tolist(),
            MARKERS[role],
            color=COLORS[role],
            alpha=0.9,
            linestyle="none",
            label=role,
        )
    _name_layers(axes, report)
    axes.margins(y=0.1)
    axes.grid(axis="y", alpha=0.2)
    return axes.figure, axes


def _from_zero(axes: Axes) -> None:
    """Scale the axis from zero to a little above all marks, so that no mark is cut."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.1 * top if top > 0 else 1)


def _legend(axes: Axes) -> None:
    """Put the legend beside the panel, where it covers nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def _heads(layer: LayerReport) -> range:
    return range(len(layer.keys.statistics.usage))


def _height(num_rows: int) -> float:
    return min(2.2 + 0.2 * num_rows, 12)


def _name_layers(axes: Axes, report: RoutingReport) -> None:
    labels = [layer.label for layer in report.layers]
    step = -(-len(labels) // MAX_LABELLED)
    rotation = 45 if max(map(len, labels)) > 3 and len(labels) > 6 else 0
    axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=rotation)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel("layer")


def _name_rows(axes: Axes, labels: list[str]) -> None:
    step = -(-len(labels) // MAX_LABELLED)
    axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=8)
