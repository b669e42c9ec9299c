# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""matplotlib figures as inline SVG in the text colour of the page, so that they are readable on light and dark pages."""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0b0c0d"  # a colour that no figure uses otherwise; becomes `currentColor`
STYLE = {
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
            "legend.edgecolor",
        ),
        INK,
    ),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.facecolor": "none",
    "legend.framealpha": 0.2,
    "savefig.facecolor": "none",
    "font.size": 10.0,
    "font.family": ["sans-serif"],
    # Text stays text: it can be read aloud, searched, and written in any script that the browser has
    "svg.fonttype": "none",
}


def inline_svg(figure: Figure, identifier: str, label: str) -> str:
    """
    Write a figure as an `<svg>` element for an HTML page.

    Args:
        figure (`matplotlib.figure.Figure`): a figure that was drawn within `matplotlib.rc_context(STYLE)`.
        identifier (`str`): separates the ids of the elements of this figure from other figures of the page.
        label (`str`): a description of the figure for readers who do not see it.

    Returns:
        `str`: the element.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": identifier}), warnings.catch_warnings():
        # Its own font only measures the text; the browser draws it in one that has the characters
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # HTML needs no namespace for SVG, and the page should contain no address
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=").replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{identifier}-', svg)
    svg = re.sub(r'href="#', f'href="#{identifier}-', svg).replace("url(#", f"url(#{identifier}-")
    # The figure is as wide as the page allows
    svg = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
