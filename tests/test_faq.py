# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of questions quotes messages that the package really gives."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
QUOTED = re.findall(r'^## "(.*)"$', (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
# String literals on successive lines are one message
SOURCES = [
    re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in sorted((ROOT / "gma_hf").rglob("*.py"))
]


@pytest.mark.quick
@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_package(message):
    assert any(message in source for source in SOURCES)
