# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The registry of backends: interchangeable ways to compute the same operator.

A backend is a name, a function `AttentionCall -> AttentionResult`, a predicate that says why it cannot run a call, and a
priority by which `backend="auto"` chooses among those that can.
"""

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention.mixture import MixtureCoefficients, mixture_coefficients


State = tuple[Tensor, Tensor]  # S [batch, mixtures, components, value_dim], z [batch, mixtures, components]


class AttentionCall(NamedTuple):
    """One validated call of the operator, as every backend receives it.

    Packed sequences have become resets in `log_decay` already, so that a backend knows the write weight and the decay
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
    """What a backend returns; a plain pair of the first two will do where the normaliser is not asked for."""

    output: Tensor  # [batch, query_heads, query_length, value_dim]
    state: State | None  # after the last token
    normalizer: Tensor | None = (
        None  # D = gamma^Q z + eps [batch, query_heads, query_length], in the state's precision
    )


class Backend(NamedTuple):
    """A named way to compute the operator."""

    name: str
    function: Callable[[AttentionCall], AttentionResult]
    supports: Callable[[AttentionCall], str | None]  # None, or why the backend cannot run the call
    priority: Callable[[AttentionCall], int]  # "auto" takes the supporting backend that gives the largest number


logger = logging.getLogger(__name__)
_BACKENDS: dict[str, Backend] = {}
_EXPLAINED: set[str] = set()  # reasons that have been logged
ENVIRONMENT_VARIABLE = "GMA_HF_BACKEND"


def register_backend(
    name: str,
    function: Callable[[AttentionCall], AttentionResult],
    *,
    supports: Callable[[AttentionCall], str | None],
    priority: Callable[[AttentionCall], int],
) -> None:
    """Make a backend known under `name`; a later registration of the same name replaces the earlier one."""
    _BACKENDS[name] = Backend(name, function, supports, priority)


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts besides "auto"."""
    return tuple(_BACKENDS)


def select_backend(name: str, call: AttentionCall) -> Backend:
    """The backend that `name` stands for, or ValueError saying why it cannot run this call and which can."""
    name = os.environ.get(ENVIRONMENT_VARIABLE) or name
    if name == "auto":
        best, highest = None, 0
        for backend in _BACKENDS.values():  # spelled out: torch.compile does not trace max() with a key
            if backend.supports(call) is None:
                priority = backend.priority(call)
                if best is None or priority > highest:
                    best, highest = backend, priority
        if best.name != "triton" and call.query.is_cuda and not torch.compiler.is_compiling():
            explain_fallback(call)
        return best
    if name not in _BACKENDS:
        raise ValueError(f"Unknown backend {name!r}; expected 'auto' or one of {list(_BACKENDS)}.")
    reason = _BACKENDS[name].supports(call)
    if reason is not None:
        able = [other.name for other in _BACKENDS.values() if other.supports(call) is None]
        raise ValueError(f"Backend {name!r} cannot run this call: {reason} Use 'auto' or one of {able}.")
    return _BACKENDS[name]


def explain_fallback(call: AttentionCall) -> None:
    """Log once why the fused kernels cannot run a call on a GPU."""
    reason = _BACKENDS["triton"].supports(call)
    if reason is not None and reason not in _EXPLAINED:
        _EXPLAINED.add(reason)
        logger.info("The fused kernels cannot run this call: %s Plain PyTorch does.", reason)
