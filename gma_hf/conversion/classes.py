# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders that gma_hf 0.1 saved import their classes from this module: their remote code names it."""

from .checkpoints import classes


def __getattr__(name: str):
    return getattr(classes, name)
