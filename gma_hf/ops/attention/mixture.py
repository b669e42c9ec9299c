# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The mixture: how likely is it that component c produced token x?

    gamma_c(x) = softmax_c( log pi_c - 1/2 sum_m [ log sigma^2_cm + (x_m - mu_cm)^2 / sigma^2_cm ] )

with pi = softmax(prior_logits) and sigma^2 = softplus(raw_variances) + variance_floor. Expanding the square gives two matrix
products and a bias, so no tensor [length, components, routing_dim] is ever formed:

    logits = x @ (mu / sigma^2)^T + (x * x) @ (-1/2 / sigma^2)^T + bias
    bias_c = log pi_c - 1/2 sum_m [ log sigma^2_cm + mu_cm^2 / sigma^2_cm ]

Softmax does not depend on terms that all components share. Two such terms are removed, because they are large and would cost
the small differences between components their digits:

- x and mu are centred on the average mean of the components, so that a common offset is never squared;
- the average precision of the components is subtracted in the quadratic product, so that x * x is multiplied by the
  differences between components only (by zero if their variances are equal).

Equations of Y. Huang and H. Raza, "Gaussian Mixture Attention", arXiv:2606.18283. The centring is ours.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat import is_exporting_to_onnx


# Coordinates further than this from the mixture's centre are clipped, so that their squares (times precisions up to
# 1e12) stay finite in float32: an arbitrarily large key then has a one-hot responsibility, never NaN.
MAX_DISTANCE = 1e12
# Added to C times the squared length of a route relative to the average component: tokens that prefer next to nothing count for
# less, instead of being blown up to full length
CORRELATION_EPS = 1e-8


class MixtureCoefficients(NamedTuple):
    """One mixture per head, as the map from a token to the logits of the components."""

    centre: Tensor  # [heads, 1, routing_dim]
    linear: Tensor  # [heads, components, routing_dim], mu / sigma^2
    quadratic: Tensor  # [heads, components, routing_dim], -1/2 / sigma^2
    bias: Tensor  # [heads, 1, components]


def mixture_coefficients(
    means: Tensor, raw_variances: Tensor, prior_logits: Tensor, variance_floor: float, dtype: torch.dtype
) -> MixtureCoefficients:
    """The coefficients of means and raw variances [heads, components, routing_dim] and prior logits, in `dtype`."""
    means, raw_variances, prior_logits = means.to(dtype), raw_variances.to(dtype), prior_logits.to(dtype)
    variances = F.softplus(raw_variances) + variance_floor
    precisions = variances.reciprocal()
    # What is subtracted is common to all components, so responsibilities do not depend on it: no gradient either.
    centre = means.detach().mean(dim=1, keepdim=True)
    common_precision = precisions.detach().mean(dim=1, keepdim=True)
    means = means - centre
    linear = means * precisions
    quadratic = -0.5 * (precisions - common_precision)
    bias = prior_logits.log_softmax(dim=-1) - 0.5 * (variances.log() + means * linear).sum(dim=-1)
    return MixtureCoefficients(centre, linear, quadratic, bias.unsqueeze(-2))


def centred(x: Tensor, centre: Tensor) -> Tensor:
    """x - centre, clipped to coordinates whose squares are finite."""
    return (x.to(centre.dtype) - centre).clamp_(-MAX_DISTANCE, MAX_DISTANCE)


def smallest_share(dtype: torch.dtype) -> float:
    """
    The smallest responsibility relative to the largest: 1e-19 in float32. It is far below rounding, but the product of two
    such numbers is still a normal number. Many CPUs are a hundred times slower on denormal numbers.
    """
    return math.sqrt(torch.finfo(dtype).tiny)


def component_logits(x: Tensor, coefficients: MixtureCoefficients) -> Tensor:
    """Logits of the components for centred tokens, at most 0: [heads, ..., routing_dim] -> [heads, ..., components]."""
    rows = x.flatten(1, -2)
    logits = torch.baddbmm(coefficients.bias, rows, coefficients.linear.transpose(1, 2))
    logits = logits.baddbmm_(rows * rows, coefficients.quadratic.transpose(1, 2))
    logits = logits.sub_(logits.detach().amax(dim=-1, keepdim=True)).clamp_(min=math.log(smallest_share(logits.dtype)))
    return logits.unflatten(1, x.shape[1:-1])


class Route(NamedTuple):
    """The route of tokens: the weights with which they write to the components and read from them, and the posterior."""

    weights: Tensor  # gamma, or rho
    gamma: Tensor


def plus_eps(total: Tensor, eps: float) -> Tensor:
    """
    total + eps, `(..., 1)`. The optimizer of ONNX programs takes constants below 1e-8 for 0 and drops their addition, but the
    eps of a memory behind a window is 1e-19, and the eps of correlations is 1e-8 / C. So a program for ONNX puts eps beside
    each total, and sums both.
    """
    if is_exporting_to_onnx():
        return F.pad(total, (0, 1), value=eps).sum(dim=-1, keepdim=True)
    return total + eps


def correlated(gamma: Tensor) -> Tensor:
    """
    The route relative to the average component, with unit length. The product of two such routes is their correlation.

        delta = gamma - 1/C         rho = sqrt(C) delta / sqrt(C |delta|^2 + CORRELATION_EPS)

    A component above 0 is preferred to the average component. A token without a preference is 0 everywhere.
    """
    delta = gamma - 1.0 / gamma.shape[-1]
    return delta * inverse_length(delta)


def inverse_length(delta: Tensor) -> Tensor:
    """sqrt(C) / sqrt(C |delta|^2 + CORRELATION_EPS), [..., C] -> [..., 1]."""
    return plus_eps(delta.square().sum(dim=-1, keepdim=True), CORRELATION_EPS / delta.shape[-1]).rsqrt()


def route(x: Tensor, coefficients: MixtureCoefficients, correlate: bool) -> Route:
    """The route of centred tokens, in the memory of the logits and without autograd. Shapes as in `component_logits`."""
    gamma = component_logits(x, coefficients).exp_()
    gamma.div_(gamma.sum(dim=-1, keepdim=True))
    return Route(correlated(gamma) if correlate else gamma, gamma)


def route_backward(
    grad: Tensor, routed: Route, x: Tensor, coefficients: MixtureCoefficients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Gradients of `route` with respect to x, linear, quadratic and bias. Overwrites `grad` (of the weights) and `x`.

    d logit_c = gamma_c (d gamma_c - sum_j gamma_j d gamma_j). The logits are linear in x, in x * x and in the coefficients.
    Together this is the responsibility-modulated gradient of the paper. With correlation, d gamma = (d rho - rho (rho . d
    rho)) sqrt(C) / sqrt(C |delta|^2 + CORRELATION_EPS).
    """
    weights, gamma = routed
    if weights is not gamma:
        grad = grad.addcmul_(weights, (weights * grad).sum(dim=-1, keepdim=True), value=-1)
        delta = gamma - 1.0 / gamma.shape[-1]
        grad = grad.mul_(inverse_length(delta))
    weighted = grad.mul_(gamma)
    grad_logits = weighted.addcmul_(gamma, weighted.sum(dim=-1, keepdim=True), value=-1).flatten(1, -2)
    rows = x.flatten(1, -2)
    grad_linear = torch.bmm(grad_logits.transpose(1, 2), rows)
    grad_rows = torch.bmm(grad_logits, coefficients.linear)
    grad_rows.addcmul_(rows, torch.bmm(grad_logits, coefficients.quadratic), value=2)
    grad_quadratic = torch.bmm(grad_logits.transpose(1, 2), rows.mul_(rows))
    return grad_rows.view_as(x), grad_linear, grad_quadratic, grad_logits.sum(dim=1, keepdim=True)


def responsibilities(x: Tensor, coefficients: MixtureCoefficients, correlate: bool = False) -> Tensor:
    """
    Posterior of the components: [batch, heads, length, routing_dim] -> [batch, heads, length, components].

    If there are more heads than mixtures, neighbouring heads share a mixture. `correlate` returns rho instead.
    """
    heads, mixtures = x.shape[1], coefficients.centre.shape[0]
    x = x.unflatten(1, (mixtures, heads // mixtures)).transpose(0, 1)
    x = centred(x, coefficients.centre[:, :, None, None])
    gamma = component_logits(x, coefficients).softmax(dim=-1).transpose(0, 1).flatten(1, 2)
    return correlated(gamma) if correlate else gamma


def unwritten_as_zero(x: Tensor, write_weight: Tensor | None) -> Tensor:
    """
    Keys or values [..., length, dim], with 0 for NaN and infinity where the write weight [..., length] is 0, because padding
    writes nothing. Finite numbers stay, because the gradient of a weight of 0 needs them.
    """
    if write_weight is None:
        return x
    return torch.where(write_weight.unsqueeze(-1) == 0, x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), x)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Each head of [batch, h, ...] repeated to give `heads` heads; a view when h is `heads` or 1."""
    if x.shape[1] == heads:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, heads, *x.shape[2:])
    return x.repeat_interleave(heads // x.shape[1], dim=1)
