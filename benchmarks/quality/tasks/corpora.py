# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How the benchmarks read data sets, and keep what they made of them."""

import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import torch


def rows_of(path: Path) -> Iterator[dict]:
    """The rows of a JSON-lines file packed by xz."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def texts_of(path: Path) -> Iterator[str]:
    """The field `text` of these rows."""
    return (row["text"] for row in rows_of(path))


def text_of(path: Path) -> str:
    """A whole text packed by xz."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def save(prepared: dict, path: Path) -> None:
    """Write tensors, packed by xz if the name says so: by a half, in minutes."""
    file = io.BytesIO()  # PyTorch jumps about in its files, which a packed one cannot do
    torch.save(prepared, file)
    path.write_bytes(lzma.compress(file.getvalue()) if path.suffix == ".xz" else file.getvalue())


def load(path: Path) -> dict:
    """What `save` wrote."""
    data = path.read_bytes()
    return torch.load(io.BytesIO(lzma.decompress(data) if path.suffix == ".xz" else data), weights_only=True)
