# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The operator: one public function, `gaussian_mixture_attention`, and its interchangeable backends."""

from .attention.functional import (
    gaussian_mixture_affinity,
    gaussian_mixture_attention,
    gaussian_mixture_responsibilities,
)
from .attention.ways import available_backends


__all__ = [
    "available_backends",
    "gaussian_mixture_affinity",
    "gaussian_mixture_attention",
    "gaussian_mixture_responsibilities",
]
