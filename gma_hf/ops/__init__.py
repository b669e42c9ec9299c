# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The operator: one public function, `gaussian_mixture_attention`, and its interchangeable backends. Each operator has a room of its
own, with its equations on top; `dispatch` chooses among the ways of each.
"""

from .attention import (
    available_backends,
    gaussian_mixture_affinity,
    gaussian_mixture_attention,
    gaussian_mixture_attention_in_slots,
    gaussian_mixture_responsibilities,
)


__all__ = [
    "available_backends",
    "gaussian_mixture_affinity",
    "gaussian_mixture_attention",
    "gaussian_mixture_attention_in_slots",
    "gaussian_mixture_responsibilities",
]
