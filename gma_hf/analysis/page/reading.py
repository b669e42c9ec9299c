# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How to read the numbers: each value beside its value without routing, and what a good value is."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..report import RoleReport, RoutingReport


COLUMNS = ("Keys", "Queries", "Without routing", "A good value")


def reading(report: RoutingReport) -> list[list[str]]:
    """
    The measures as rows of a table. Values are means over all heads of all layers.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].

    Returns:
        `list[list[str]]`: a row per measure: its name, then the cells of `COLUMNS`.
    """

    def means(values: Callable[[RoleReport], Tensor], form: str) -> list[str]:
        found = [
            torch.cat([values(getattr(layer, role)).double() for layer in report.layers])
            for role in ("keys", "queries")
        ]
        return [format(float(part.mean()), form) for part in found]

    def dead(role: str) -> str:
        found = [getattr(layer, role).statistics for layer in report.layers]
        return (
            f"{sum(int(part.dead_components.sum()) for part in found)} of {sum(part.usage.numel() for part in found)}"
        )

    def shuffled(measure: str, form: str) -> str:
        keys, queries = means(lambda part: getattr(part.alignment, f"{measure}_shuffled_mean"), form)
        return f"{keys if keys == queries else f'{keys} and {queries}'} (shuffled)"

    # A correlation sees only the direction in which a route differs from the average component, not how far it differs
    of_correlated = (
        ". The layers with correlated routes read only what differs from the average component, however small: for them, "
        "this value says little"
        if any(layer.correlate for layer in report.layers)
        else ""
    )
    return [
        [
            "Components in use",
            *means(lambda part: part.statistics.usage_perplexity / part.statistics.usage.shape[-1], ".0%"),
            "100%",
            "more than half. At a few per cent, the head has collapsed to few components",
        ],
        ["Dead components", dead("keys"), dead("queries"), "0", "0, or few"],
        [
            "Entropy, of log C",
            *means(lambda part: part.statistics.entropy / math.log(max(part.statistics.usage.shape[-1], 2)), ".0%"),
            "100%",
            "well below 100%: tokens choose. A model before training is near 100%" + of_correlated,
        ],
        [
            "Median margin",
            *means(lambda part: part.statistics.margin_quantile(0.5), ".2f"),
            "0",
            "above 1: the first component is more than e = 2.7 times as responsible as the second" + of_correlated,
        ],
        [
            "NMI with categories",
            *means(lambda part: part.alignment.nmi, ".3f"),
            shuffled("nmi", ".3f"),
            "several times the shuffled value: components follow what tokens look like. A low value is no fault: heads "
            "may route by other things",
        ],
        [
            "Purity",
            *means(lambda part: part.alignment.purity, ".2f"),
            shuffled("purity", ".2f"),
            "above the shuffled value",
        ],
    ]
