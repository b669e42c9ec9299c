# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The ways to compute attention, by preference."""

from ..dispatch import BACKENDS, Way, not_in_forward_mode
from . import fused, recurrent
from .chunked.attention import chunked_attention
from .reference import reference_attention


WAYS = (
    Way("triton", fused.cannot_run, fused.suits, fused.fused_attention),
    Way("recurrent", recurrent.cannot_run, recurrent.suits, recurrent.recurrent_attention),
    Way("chunked", lambda call: not_in_forward_mode(), lambda call: True, chunked_attention),
    Way("reference", lambda call: None, lambda call: True, reference_attention),
)


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` of [`gaussian_mixture_attention`] accepts besides "auto", by preference."""
    return BACKENDS
