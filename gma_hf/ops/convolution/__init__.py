# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The depthwise short convolution over the real tokens of one sequence, b of its K taps looking back:

    y_p = SiLU(sum_j weight_j x_{p+j-b})

`functional` is the public door, `reference` the definition. The ways register themselves when they are imported, here: `fused`
(the kernels in `triton`) and `plain` (PyTorch).
"""

from . import fused, plain


__all__ = ["fused", "plain"]
