# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The mixtures of one layer: their parameters, and the one door through which attention is computed."""

import math
import os
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import is_tracing

from ..ops import gaussian_mixture_affinity, gaussian_mixture_attention, gaussian_mixture_responsibilities
from ..ops.attention.mixture import mixture_coefficients
from ..ops.attention.recurrent import step, step_coefficients
from ..ops.dispatch import ENVIRONMENT_VARIABLE
from ..ops.window.blocks import accumulation_dtype


class GMAMixture(nn.Module):
    """
    One Gaussian mixture per head, shared by queries and keys; its forward pass is the attention.

    Name the attribute that holds it `mixture_norm`: every Hugging Face Trainer exempts parameters below a `..._norm` from
    weight decay, and a decay would pull the components of a mixture towards each other.

    Args:
        num_heads (`int`): number of mixtures.
        num_components (`int`): components per mixture.
        routing_dim (`int`): dimension of queries and keys.
        variance_floor (`float`): smallest variance.
        eps (`float`): constant added to the normaliser of the read.
        correlate (`bool`, *optional*, defaults to `False`): tokens write and read by the correlation of their routes, see
            [`gaussian_mixture_attention`].

    Attributes:
        means (`torch.Tensor` of shape `(num_heads, num_components, routing_dim)`): mu.
        raw_variances (`torch.Tensor` of the same shape): omega, with sigma^2 = softplus(omega) + variance_floor.
        prior_logits (`torch.Tensor` of shape `(num_heads, num_components)`): alpha, with pi = softmax(alpha).
    """

    def __init__(
        self,
        num_heads: int,
        num_components: int,
        routing_dim: int,
        variance_floor: float,
        eps: float,
        correlate: bool = False,
    ):
        super().__init__()
        self.correlate = correlate
        self.variance_floor = variance_floor
        self.eps = eps
        self.means = nn.Parameter(torch.empty(num_heads, num_components, routing_dim))
        self.raw_variances = nn.Parameter(torch.empty(num_heads, num_components, routing_dim))
        self.prior_logits = nn.Parameter(torch.empty(num_heads, num_components))

    def reset_parameters(self, mean_std: float, variance: float, balanced_priors: bool):
        """
        Means ~ N(0, `mean_std`^2), all variances `variance`, and priors that are equal or, if balanced, such that all
        components are equally responsible for x = 0. Queries and keys start near zero, where under equal priors the one
        component with the shortest mean would take nearly everything.
        """
        init.normal_(self.means, mean=0.0, std=mean_std)
        init.constant_(self.raw_variances, math.log(math.expm1(variance - self.variance_floor)))
        if balanced_priors:
            init.copy_(self.prior_logits, 0.5 * self.means.float().square().sum(-1) / variance)
        else:
            init.zeros_(self.prior_logits)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        eps: float | None = None,
        kept: Any = None,
        writes_all: bool = False,
        **kwargs,
    ):
        """
        Gaussian mixture attention, see [`gaussian_mixture_attention`] for shapes and further arguments; `eps` is the
        mixture's own if it is not given, `kept` a [`KeptValues`] for what a decoding step needs of the parameters, `writes_all` whether no write weight of the
        step is zero. A forward
        pre-hook on this module sees the queries and keys exactly as they are routed.
        """
        eps = self.eps if eps is None else eps
        if kept is not None and is_step_on_cpu(query, kwargs):
            return self._step(query, key, value, eps, kept, writes_all, **kwargs)
        return gaussian_mixture_attention(
            query,
            key,
            value,
            self.means,
            self.raw_variances,
            self.prior_logits,
            eps=eps,
            variance_floor=self.variance_floor,
            correlate=self.correlate,
            **kwargs,
        )

    def _step(self, query, key, value, eps, kept, writes_all, *, initial_state, output_normalizer=False, **kwargs):
        """The same for one token that goes on from a state, with as few operations as possible."""
        dtype = accumulation_dtype(query, value)

        def compute(means, raw_variances, prior_logits):
            return step_coefficients(
                mixture_coefficients(means, raw_variances, prior_logits, self.variance_floor, dtype)
            )

        S, z = initial_state
        shape = (query.shape[0], *self.means.shape[:2], value.shape[3])
        if S.shape != shape:
            raise ValueError(
                f"initial_state S has shape {list(S.shape)}, expected [batch, mixtures, components, value_dim] = {list(shape)}. "
                "Was it written by another model?"
            )
        parameters = (self.means, self.raw_variances, self.prior_logits)
        output, state, normalizer = step(
            query,
            key,
            value,
            kept.get(f"mixture in {dtype}", parameters, compute),
            state=(S.to(dtype), z.to(dtype)),
            normalize=kwargs.get("normalize", True),
            write_weight=kwargs.get("write_weight"),
            log_decay=kwargs.get("log_decay"),
            eps=eps,
            output_normalizer=output_normalizer,
            correlate=self.correlate,
            writes_all=writes_all,
        )
        return (output, normalizer, state) if output_normalizer else (output, state)

    def affinity(self, query: torch.Tensor, key: torch.Tensor, **kwargs) -> torch.Tensor:
        """The matrix that the attention implies, `(batch, heads, query_length, key_length)`: quadratic, to look at."""
        return gaussian_mixture_affinity(
            query,
            key,
            self.means,
            self.raw_variances,
            self.prior_logits,
            eps=self.eps,
            variance_floor=self.variance_floor,
            correlate=self.correlate,
            **kwargs,
        )

    def responsibilities(self, states: torch.Tensor) -> torch.Tensor:
        """Posterior of the components, `(batch, heads, length, num_components)`, of queries or keys."""
        return gaussian_mixture_responsibilities(
            states, self.means, self.raw_variances, self.prior_logits, variance_floor=self.variance_floor
        )

    def extra_repr(self) -> str:
        num_heads, num_components, routing_dim = self.means.shape
        return f"num_heads={num_heads}, num_components={num_components}, routing_dim={routing_dim}"


def is_step_on_cpu(query: torch.Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a call is one token that goes on from a state, without gradients, where no kernel does better."""
    if query.shape[2] != 1 or query.device.type != "cpu" or torch.is_grad_enabled() or is_tracing(query):
        return False
    if os.environ.get(ENVIRONMENT_VARIABLE, "auto") not in ("", "auto", "recurrent"):
        return False
    known = arguments.get("initial_state") is not None and arguments.get("output_final_state", False)
    return known and arguments.get("sequence_ids") is None
