# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The operators. The public function is `gaussian_mixture_attention`, with interchangeable backends. Each operator has its own
folder, with its equations at the top; `dispatch` chooses the backend of each.
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
