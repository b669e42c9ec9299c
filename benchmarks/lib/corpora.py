# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How the benchmarks read the data sets that they prepare."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path


def rows_of(path: Path) -> Iterator[dict]:
    """The rows of a JSON-lines file packed by xz."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def texts_of(path: Path) -> Iterator[str]:
    """The field `text` of these rows."""
    return (row["text"] for row in rows_of(path))
