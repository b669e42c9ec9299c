# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Undo rotary positions. The rotation [[c, -s], [s, c]] has turned a pair of dimensions (x, x'). Its inverse is

    y = (c x + s x') / (c^2 + s^2)        y' = (c x' - s x) / (c^2 + s^2)

`functional` has the public class, `reference` the definition. The backends register themselves when they are imported,
below: `fused` (the kernel in `triton`) and `plain` (PyTorch).
"""

from . import fused, plain


__all__ = ["fused", "plain"]
