# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How a model routes tokens: usage, entropy, margins and meaning of the components of its Gaussian mixtures.

`analyze` reads a text with a model and returns a `RoutingReport`; `write_report` and the `plot_*` functions show it.
Works for every model with `GMAMixture` modules, native or converted. Only the plots need matplotlib.
"""

from .alignment import Alignment, align, normalized_mutual_information, purity
from .analyzing import analyze, look_closely
from .collection import LayerResponsibilities, find_mixtures, implied_affinity, responsibilities
from .errors import AnalysisError
from .page import html_page, write_report
from .plots import (
    plot_affinity,
    plot_alignment,
    plot_categories,
    plot_entropy,
    plot_margin,
    plot_route,
    plot_stability,
    plot_usage,
)
from .report import Excerpt, LayerReport, RoutingReport, TokenRoute
from .routing import Routing, route
from .statistics import LayerStatistics, RoutingStatistics, collect_statistics
from .surface import CATEGORIES, token_categories, token_surfaces
from .text import EncodedText, TokenBatch, encode_text


__all__ = [
    "CATEGORIES",
    "Alignment",
    "AnalysisError",
    "EncodedText",
    "Excerpt",
    "LayerReport",
    "LayerResponsibilities",
    "LayerStatistics",
    "Routing",
    "RoutingReport",
    "RoutingStatistics",
    "TokenBatch",
    "TokenRoute",
    "align",
    "analyze",
    "collect_statistics",
    "encode_text",
    "find_mixtures",
    "html_page",
    "implied_affinity",
    "look_closely",
    "normalized_mutual_information",
    "plot_affinity",
    "plot_alignment",
    "plot_categories",
    "plot_entropy",
    "plot_margin",
    "plot_route",
    "plot_stability",
    "plot_usage",
    "purity",
    "responsibilities",
    "route",
    "token_categories",
    "token_surfaces",
    "write_report",
]
