# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of guarantees names tests that exist, and every promise names one."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)` `(test_\w+)`", PAGE)
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.endswith("| test |")]


@pytest.mark.quick
@pytest.mark.parametrize(("file", "function"), sorted(set(NAMED)))
def test_every_named_test_exists(file, function):
    assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.quick
def test_every_promise_names_its_test():
    assert ROWS and all(re.search(r"`[\w/]+\.py` `test_\w+`[^|]*\|$", row) for row in ROWS)
    assert len(re.findall(r"`test_\w+`", PAGE)) == len(NAMED)
