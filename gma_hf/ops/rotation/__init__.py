# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Rotary positions undone: [[c, -s], [s, c]] has turned a pair of dimensions (x, x'), and its inverse turns them back,

    y = (c x + s x') / (c^2 + s^2)        y' = (c x' - s x) / (c^2 + s^2)

`functional` is the public door, `reference` the definition. The ways register themselves when they are imported, here: `fused`
(the kernel in `triton`) and `plain` (PyTorch).
"""

from . import fused, plain


__all__ = ["fused", "plain"]
