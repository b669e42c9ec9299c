# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A call of the operator, as every way to compute it receives it, and what it returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from .mixture import MixtureCoefficients, mixture_coefficients


State = tuple[Tensor, Tensor]  # S [batch, mixtures, components, value_dim], z [batch, mixtures, components]


class AttentionCall(NamedTuple):
    """One validated call of the operator, as every way to compute it receives it.

    Packed sequences have become resets in `log_decay` already, so that a way knows the write weight and the decay
    of the general recurrence only.
    """

    query: Tensor  # [batch, query_heads, query_length, routing_dim]
    key: Tensor  # [batch, key_value_heads, key_length, routing_dim]
    value: Tensor  # [batch, key_value_heads, key_length, value_dim]
    means: Tensor  # [mixtures, components, routing_dim]
    raw_variances: Tensor  # [mixtures, components, routing_dim]
    prior_logits: Tensor  # [mixtures, components]
    causal: bool
    strict: bool  # position i reads j < i instead of j <= i; only in causal calls with log_decay
    write_weight: Tensor | None  # [batch, 1 or mixtures, key_length]
    log_decay: Tensor | None  # [batch, 1 or mixtures, key_length], causal only
    normalize: bool
    eps: float
    variance_floor: float
    initial_state: State | None
    output_final_state: bool
    output_normalizer: bool = False  # only where the read is normalised
    correlate: bool = False  # rho instead of gamma, where the read is not normalised

    @property
    def state_dtype(self) -> torch.dtype:
        """Precision of logits, responsibilities and state: float32, or float64 when an input has it."""
        dtype = torch.promote_types(self.query.dtype, self.key.dtype)
        return torch.promote_types(torch.promote_types(dtype, self.value.dtype), torch.float32)

    @property
    def needs_gradients(self) -> bool:
        """Whether autograd records the call."""
        if not torch.is_grad_enabled():
            return False
        tensors = (*self[:6], self.write_weight, self.log_decay, *(self.initial_state or ()))
        return any(x is not None and x.requires_grad for x in tensors)

    def coefficients(self) -> MixtureCoefficients:
        """The mixture as the affine map of its logits, in the state's precision."""
        return mixture_coefficients(
            self.means, self.raw_variances, self.prior_logits, self.variance_floor, self.state_dtype
        )


class AttentionResult(NamedTuple):
    """What a way returns; a plain pair of the first two will do where the normaliser is not asked for."""

    output: Tensor  # [batch, query_heads, query_length, value_dim]
    state: State | None  # after the last token
    normalizer: Tensor | None = (
        None  # D = gamma^Q z + eps [batch, query_heads, query_length], in the state's precision
    )
