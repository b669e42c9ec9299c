# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Exact softmax over the nearest tokens, which shares its normaliser with the memory of what is older:

    o_i = (sum_{j near i} e^{s_ij} v_j + e^{m_i} r_i) / (sum_{j near i} e^{s_ij} + e^{m_i})

with r_i what the memory reads, D_i the weight of what r_i is a mean of, and m_i = a + u . q_i + log D_i.

`functional` is the public door, `plan` what the window looks at. The ways register themselves when they are imported, here:
`softmax` (operators of our own, whose passes are in `blocks` and in the kernels of `triton`), `dense` (all pairs, for ONNX).
"""

from . import dense, softmax


__all__ = ["dense", "softmax"]
