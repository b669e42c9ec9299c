# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A hook of the site's generator: formulas become MathML, which browsers show without a script or a network."""

import html
import re

from latex2mathml.converter import convert


FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<display>.*?)\\\])</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **kwargs) -> str:
    """Replace every formula of a page."""

    def formula(match: re.Match) -> str:
        inline = match["inline"]
        source = html.unescape(match["display"] if inline is None else inline).replace(r"\operatorname", r"\mathrm")
        if inline is not None:
            return convert(source, display="inline")
        # A formula that is wider than the screen scrolls, and the page does not
        return f'<div style="overflow-x: auto; overflow-y: hidden">{convert(source, display="block")}</div>'

    return FORMULA.sub(formula, content)
