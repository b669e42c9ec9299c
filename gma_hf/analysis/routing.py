# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How a mixture routes given queries or keys: to which components, how decidedly, and how stably.

For a token x of one head, with logits l_c(x) = log pi_c N(x; mu_c, sigma_c^2) up to a constant:

    gamma(x)       = softmax(l(x))
    margin(x)      = l_(1)(x) - l_(2)(x), the difference of the two largest logits
    d gamma_c / dx = gamma_c (g_c - gbar)     with g_c = -(x - mu_c) / sigma_c^2 and gbar = sum_j gamma_j g_j
    bound(x)       = max_c ||g_c - gbar||                                     the largest spread of the g_c
    sensitivity(x) = sqrt(sum_c gamma_c^2 ||g_c - gbar||^2) = ||d gamma / dx||_F

For a small step h, ||gamma(x + h) - gamma(x)|| <= sensitivity(x) ||h|| <= bound(x) ||h||: a sum that gamma^2 weighs is at
most its largest term. Responsibilities and their gradient: Y. Huang and H. Raza, "Gaussian Mixture Attention",
arXiv:2606.18283; the two bounds are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling import GMAMixture
from ..ops.attention.mixture import MixtureCoefficients, centred, component_logits, mixture_coefficients, repeat_heads


MARGIN_CAP = 44.0  # float32 logits of the operator are at most 43.7 below the largest logit


class Routing(NamedTuple):
    """
    The routes of the tokens of one batch, with one mixture per head.

    Args:
        responsibilities (`torch.Tensor` of shape `(batch, heads, length, components)`): gamma; each row sums to 1.
        margins (`torch.Tensor` of shape `(batch, heads, length)`): difference of the two largest logits, in nats, at most
            `MARGIN_CAP`.
        bounds (`torch.Tensor` of shape `(batch, heads, length)`): stability bounds, in units of 1 / routing space.
        sensitivities (`torch.Tensor` of shape `(batch, heads, length)`): norms of the derivative, in units of 1 / routing
            space.
    """

    responsibilities: Tensor
    margins: Tensor
    bounds: Tensor
    sensitivities: Tensor


@torch.no_grad()
def route(mixture: GMAMixture, states: Tensor) -> Routing:
    """
    Route queries or keys through the mixtures of a layer. The formulas stand at the top of this file.

    Args:
        mixture (`GMAMixture`): the mixtures of the layer.
        states (`torch.Tensor` of shape `(batch, heads, length, routing_dim)`): queries or keys. The number of heads divides
            the number of mixtures, or is a multiple of it.

    Returns:
        [`Routing`]: the number of heads is the larger one of heads and mixtures. With a single component, margins are
        `MARGIN_CAP`.
    """
    num_mixtures = mixture.means.shape[0]
    with torch.autocast(device_type=states.device.type, enabled=False):
        dtype = torch.promote_types(states.dtype, torch.float32)
        coefficients = mixture_coefficients(
            mixture.means, mixture.raw_variances, mixture.prior_logits, mixture.variance_floor, dtype
        )
        x = repeat_heads(states, max(states.shape[1], num_mixtures))
        x = x.unflatten(1, (num_mixtures, -1)).transpose(0, 1)  # [mixtures, batch, group, length, routing_dim]
        x = centred(x, coefficients.centre[:, :, None, None])
        logits = component_logits(x, coefficients)
        gamma = logits.softmax(dim=-1)
        if logits.shape[-1] == 1:
            margins = torch.full_like(logits[..., 0], MARGIN_CAP)
        else:
            largest, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
            margins = (largest - second).clamp(max=MARGIN_CAP)
        distances = gradient_distances(x, gamma, coefficients)
        bounds = distances.amax(dim=-1).sqrt()
        sensitivities = (gamma.square() * distances).sum(dim=-1).sqrt()
    return Routing(*(part.transpose(0, 1).flatten(1, 2) for part in (gamma, margins, bounds, sensitivities)))


def gradient_distances(x: Tensor, gamma: Tensor, coefficients: MixtureCoefficients) -> Tensor:
    """
    |g_c - gbar||^2 `(mixtures, ..., components)` of centred tokens `(mixtures, ..., routing_dim)`.

    The coefficients do not contain the average precision of the components, which is the same term in every g_c. The rest is
    g_c = a_c + 2 q_c x with a, q the linear and quadratic coefficients, so matrix products give the distances.
    """
    linear, quadratic = coefficients.linear, coefficients.quadratic
    rows, weights = x.flatten(1, -2), gamma.flatten(1, -2)
    mean = weights @ linear + 2 * rows * (weights @ quadratic)  # gbar, [mixtures, rows, routing_dim]
    squared_norms = linear.square().sum(dim=-1)[:, None] + 4 * (
        rows @ (linear * quadratic).mT + rows.square() @ quadratic.square().mT
    )
    products = mean @ linear.mT + 2 * (mean * rows) @ quadratic.mT
    distances = squared_norms - 2 * products + mean.square().sum(dim=-1, keepdim=True)
    return distances.clamp_(min=0).view_as(gamma)
