# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The depthwise short convolution over the real tokens of one sequence. b of its K taps look back:

    y_p = SiLU(sum_j weight_j x_{p+j-b})

`functional` has the public function, `reference` the definition. The backends register themselves when they are imported,
below: `fused` (the kernels in `triton`) and `plain` (PyTorch).
"""

from . import fused, plain


__all__ = ["fused", "plain"]
