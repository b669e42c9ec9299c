# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Gaussian mixture attention. Tokens write values to the components of a mixture, and queries read them:

    S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T
    z_t = a_t z_{t-1} + w_t gamma(k_t)
    o_t = gamma(q_t) S_t / (gamma(q_t) z_t + eps)        or gamma(q_t) S_t, un-normalised

`functional` has the public functions, `call` the form of a call, its checks and the table of the backends, `mixture` gamma.
The backends register themselves in the table when they are imported, below: `fused` (the kernels in `triton`), `recurrent`
(token by token, and one decoding step), `chunked` (linear time, with gradients), `reference` (the definition). `packed`
turns packed sequences with their own states into rows for any of these backends. `slots` advances states in place. `correction`
is the delta rule, which replaces the values of a call. `minimal` is the chunked pass for readers.
"""

from . import chunked, correction, fused, packed, recurrent, reference
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
    "correction",
    "fused",
    "gaussian_mixture_affinity",
    "gaussian_mixture_attention",
    "gaussian_mixture_attention_in_slots",
    "gaussian_mixture_responsibilities",
    "packed",
    "recurrent",
    "reference",
]
