# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Exact softmax over the nearest tokens. It shares its normaliser with the memory of older tokens:

    o_i = (sum_{j near i} e^{s_ij} v_j + e^{m_i} r_i) / (sum_{j near i} e^{s_ij} + e^{m_i})

with the read r_i of the memory, its weight D_i, and m_i = a + u . q_i + log D_i.

`functional` has the public function. `plan` says which tokens the window reads. The backends register themselves when they
are imported, below: `softmax` (custom operators, whose passes are in `blocks` and in the kernels of `triton`), `dense` (all
pairs, for ONNX).
"""

from . import dense, softmax


__all__ = ["dense", "softmax"]
