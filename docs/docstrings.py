# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A hook of the site's generator: the types and references of docstrings are shown as the docstring format means them."""

import re


# `type` of shape `(...)`, *optional*, defaults to `x`: the generator takes all of it for the name of a type
TYPE = re.compile(r"<code>([^<]*`[^<]*)</code>")
# [`name`] is how Transformers' docstrings refer to a name
REFERENCE = re.compile(r"\[(<code>[^<]*</code>)\]")


def on_page_content(content: str, **kwargs) -> str:
    """Show code in docstring types as code, `*optional*` as emphasis, and references without brackets."""

    def shown(match: re.Match) -> str:
        text = re.sub(r"\[?`([^`]*)`\]?", r"<code>\1</code>", match[1])
        return text.replace("*optional*", "<em>optional</em>")

    return REFERENCE.sub(r"\1", TYPE.sub(shown, content))
