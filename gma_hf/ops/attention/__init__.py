# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Gaussian mixture attention. Tokens write values to the components of a mixture, queries read them back:

    S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T
    z_t = a_t z_{t-1} + w_t gamma(k_t)
    o_t = gamma(q_t) S_t / (gamma(q_t) z_t + eps)        or gamma(q_t) S_t, un-normalised

`functional` is the public door, `call` what passes it, its checks and the table of the ways, `mixture` gamma. The ways register
themselves in the table when they are imported, here: `fused` (the kernels in `triton`), `recurrent` (token by token, and one
decoding step), `chunked` (linear time, with gradients), `reference` (the definition). `packed` makes rows of packed sequences that have a
state each, for any of these ways, and `slots` advances states where they lie. `minimal` is the chunked pass, to be read.
"""

from . import chunked, fused, packed, recurrent, reference
from .functional import (
    available_backends,
    gaussian_mixture_affinity,
    gaussian_mixture_attention,
    gaussian_mixture_responsibilities,
)
from .slots import gaussian_mixture_attention_in_slots


__all__ = [
    "available_backends",
    "chunked",
    "fused",
    "gaussian_mixture_affinity",
    "gaussian_mixture_attention",
    "gaussian_mixture_attention_in_slots",
    "gaussian_mixture_responsibilities",
    "packed",
    "recurrent",
    "reference",
]
