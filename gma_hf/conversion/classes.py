# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Where folders saved by gma_hf 0.1 import their classes from: their remote code names this module."""

from .checkpoints import classes


def __getattr__(name: str):
    return getattr(classes, name)
