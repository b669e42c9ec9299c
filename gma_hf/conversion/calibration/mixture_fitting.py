# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Gaussian mixtures fitted to samples, one per head: k-means++ (Arthur and Vassilvitskii, 2007), Lloyd's algorithm, then
expectation maximisation (Dempster, Laird and Rubin, 1977) with diagonal covariances.

E-step, over samples x_n and components c of a head:

    gamma_nc = softmax_c( log pi_c - 1/2 sum_m [ log sigma^2_cm + (x_nm - mu_cm)^2 / sigma^2_cm ] )

M-step, with n_c = sum_n gamma_nc, and a pseudo-counts of samples spread like all of the head's samples (mean m, variance s^2):

    pi_c      = (n_c + a) / (N + C a)
    mu_c      = (sum_n gamma_nc x_n + a m) / (n_c + a)
    sigma^2_c = (sum_n gamma_nc (x_n - mu_c)^2 + a (s^2 + (m - mu_c)^2)) / (n_c + a),  at least the floor

which maximises the likelihood times a conjugate prior (Dirichlet, normal-inverse-gamma). A component that explains nothing
becomes as broad as the data instead of dying. Every step raises the logarithm of that product.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import number, whole_number


PSEUDO_COUNTS = 1e-2  # a, in samples
LARGEST_TABLE = 2**25  # entries of a [heads, samples, components] table that exist at the same time


class FittedMixtures(NamedTuple):
    """
    The parameters of fitted mixtures, and the course of the fit.

    Args:
        means (`torch.Tensor` of shape `(heads, components, dim)`): mu.
        variances (`torch.Tensor` of shape `(heads, components, dim)`): sigma^2.
        prior_logits (`torch.Tensor` of shape `(heads, components)`): log pi.
        log_likelihood (`torch.Tensor` of shape `(steps + 1, heads)`): in nats per sample, before and after every EM step.
        log_posterior (`torch.Tensor` of shape `(steps + 1, heads)`): the log-likelihood with the prior; it never falls.
    """

    means: Tensor
    variances: Tensor
    prior_logits: Tensor
    log_likelihood: Tensor
    log_posterior: Tensor

    def raw_variances(self, variance_floor: float) -> Tensor:
        """
        The parameter omega of `GMAMixture`, with sigma^2 = softplus(omega) + variance_floor.

        Args:
            variance_floor (`float`): smallest variance of the mixture.

        Returns:
            `torch.Tensor` of shape `(heads, components, dim)`: omega.
        """
        return inverse_softplus((self.variances - variance_floor).clamp(min=1e-6 * variance_floor))


def fit_mixtures(
    samples: Tensor,
    num_components: int,
    *,
    variance_floor: float = 1e-4,
    lloyd_steps: int = 5,
    em_steps: int = 20,
    generator: torch.Generator | None = None,
) -> FittedMixtures:
    """
    Fit one mixture to the samples of each head, all heads at once, on the device of the samples. The formulas stand at the
    top of this file.

    Args:
        samples (`torch.Tensor` of shape `(heads, samples, dim)`): the samples, of any floating dtype. The fit computes in
            float32.
        num_components (`int`): number of components per head.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance, in squared units of the samples.
        lloyd_steps (`int`, *optional*, defaults to `5`): steps of Lloyd's algorithm after k-means++.
        em_steps (`int`, *optional*, defaults to `20`): steps of expectation maximisation.
        generator (`torch.Generator`, *optional*): random numbers for k-means++, on the device of the samples.

    Returns:
        [`FittedMixtures`]: the mixtures, in float32.

    Raises:
        ValueError: if there are fewer samples than components, a sample is NaN or infinite, or an option is impossible.
    """
    num_components = whole_number("num_components", num_components, 1)
    lloyd_steps, em_steps = whole_number("lloyd_steps", lloyd_steps, 0), whole_number("em_steps", em_steps, 0)
    variance_floor = number("variance_floor", variance_floor, is_positive=True)
    if not isinstance(samples, Tensor):
        raise ValueError(f"`samples` must be a tensor of shape (heads, samples, dim), got a {type(samples).__name__}.")
    if samples.ndim != 3 or samples.shape[1] < num_components:
        raise ValueError(
            f"`samples` has shape {tuple(samples.shape)}; {num_components} components need (heads, samples, dim) with at "
            f"least {num_components} samples. Give more samples, or fit fewer components."
        )
    samples = samples.float()
    if not torch.isfinite(samples).all():
        raise ValueError("`samples` holds NaN or infinite numbers. Does the model run in a dtype that overflows?")
    # Relative to the mean of the head, because squares of a common offset would cost digits
    centre = samples.mean(dim=1, keepdim=True)
    samples = samples - centre
    spread = samples.square().mean(dim=1, keepdim=True).clamp(min=variance_floor)

    with torch.autocast(device_type=samples.device.type, enabled=False):
        means = seed_means(samples, num_components, generator)
        for _ in range(lloyd_steps):
            means = lloyd_step(samples, means)
        # From hard clusters to a mixture: each component as broad as the average cluster
        within = sum_over_chunks(samples, num_components, lambda x: nearest(x, means)[0].sum(dim=1))
        variances = spread * (within / samples.shape[1] / spread.sum(dim=(1, 2))).clamp(max=1.0)[:, None, None]
        variances = variances.clamp(min=variance_floor).expand_as(means).contiguous()
        log_priors = means.new_full(means.shape[:2], -math.log(num_components))

        log_likelihoods, log_posteriors = [], []
        for step in range(em_steps + 1):
            counts, sums, squares, log_likelihood = expectation(samples, means, variances, log_priors)
            log_likelihoods.append(log_likelihood)
            log_posteriors.append(log_likelihood + log_prior(means, variances, log_priors, spread) / samples.shape[1])
            if step < em_steps:
                means, variances, log_priors = maximisation(counts, sums, squares, spread, variance_floor)
    return FittedMixtures(
        means + centre, variances, log_priors, torch.stack(log_likelihoods), torch.stack(log_posteriors)
    )


def seed_means(samples: Tensor, num_components: int, generator: torch.Generator | None) -> Tensor:
    """k-means++: each mean is a sample, drawn in proportion to its squared distance from the means before it."""
    heads, count, _ = samples.shape
    rows = torch.arange(heads, device=samples.device)
    first = torch.randint(count, (heads,), device=samples.device, generator=generator)
    means = [samples[rows, first]]
    distance = torch.full(samples.shape[:2], float("inf"), device=samples.device)
    for _ in range(num_components - 1):
        distance = torch.minimum(distance, (samples - means[-1][:, None]).square().sum(dim=-1))
        # If all samples are means already, choose any sample
        weights = torch.where(distance.sum(dim=1, keepdim=True) > 0, distance, 1.0)
        # Drawn by inverting the cumulative sum: `multinomial` takes at most 2^24 categories
        cumulative = weights.to(wide_dtype(samples.device)).cumsum(dim=1)
        threshold = torch.rand(heads, 1, device=samples.device, dtype=cumulative.dtype, generator=generator)
        drawn = torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True)
        means.append(samples[rows, drawn[:, 0].clamp(max=count - 1)])
    return torch.stack(means, dim=1)


def lloyd_step(samples: Tensor, means: Tensor) -> Tensor:
    """Each mean moves to the middle of the samples nearest to it; one without samples to the sample worst represented."""
    counts, sums = means.new_zeros(means.shape[:2]), torch.zeros_like(means)
    worst_distance, worst = means.new_full(means.shape[:1], -1.0), means[:, 0]
    rows = torch.arange(means.shape[0], device=means.device)
    for chunk in chunks(samples, means.shape[1]):
        distance, index = nearest(chunk, means)
        counts.scatter_add_(1, index, torch.ones_like(distance))
        sums.scatter_add_(1, index[..., None].expand_as(chunk), chunk)
        far_distance, far = distance.max(dim=1)
        worst = torch.where((far_distance > worst_distance)[:, None], chunk[rows, far], worst)
        worst_distance = torch.maximum(worst_distance, far_distance)
    moved = sums / counts.clamp(min=1.0)[..., None]
    empty = counts == 0
    first_empty = empty & (empty.cumsum(dim=1) == 1)
    moved = torch.where(empty[..., None], means, moved)
    return torch.where(first_empty[..., None], worst[:, None], moved)


def nearest(samples: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest mean, and which it is: each `(heads, samples)`."""
    scores = torch.baddbmm(means.square().sum(dim=-1)[:, None], samples, means.transpose(1, 2), alpha=-2.0)
    distance, index = scores.min(dim=-1)
    return (distance + samples.square().sum(dim=-1)).clamp_(min=0.0), index


def expectation(
    samples: Tensor, means: Tensor, variances: Tensor, log_priors: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n_c, sum_n gamma x and sum_n gamma x^2, see [`wide_dtype`], and the log-likelihood per sample `(heads,)`."""
    heads, num_components, dim = means.shape
    wide = wide_dtype(means.device)
    counts = means.new_zeros(heads, num_components, dtype=wide)
    sums, squares = (torch.zeros_like(means, dtype=wide) for _ in range(2))
    total = means.new_zeros(heads, dtype=wide)
    constant = dim * math.log(2 * math.pi)
    precisions = variances.reciprocal()
    bias = log_priors - 0.5 * (variances.log() + means.square() * precisions).sum(dim=-1)
    for chunk in chunks(samples, num_components):
        logits = torch.baddbmm(bias[:, None], chunk, (means * precisions).transpose(1, 2))
        logits = logits.baddbmm_(chunk.square(), precisions.transpose(1, 2), alpha=-0.5)
        log_density = logits.logsumexp(dim=-1, keepdim=True)
        gamma = logits.sub_(log_density).exp_().transpose(1, 2)
        counts += gamma.sum(dim=-1, dtype=wide)
        sums += gamma @ chunk
        squares += gamma @ chunk.square()
        total += log_density.sum(dim=(1, 2), dtype=wide)
    return counts, sums, squares, (total / samples.shape[1] - 0.5 * constant).float()


def maximisation(
    counts: Tensor, sums: Tensor, squares: Tensor, spread: Tensor, variance_floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and log priors from the sums of the E-step; samples are centred, so m = 0."""
    weight = (counts + PSEUDO_COUNTS)[..., None]
    means = sums / weight
    # sum gamma (x - mu)^2 + a mu^2 = sum gamma x^2 - (n + a) mu^2
    variances = (squares + PSEUDO_COUNTS * spread) / weight - means.square()
    log_priors = weight[..., 0].log().log_softmax(dim=-1)
    return means.float(), variances.clamp(min=variance_floor).float(), log_priors.float()


def log_prior(means: Tensor, variances: Tensor, log_priors: Tensor, spread: Tensor) -> Tensor:
    """Logarithm of the prior that the pseudo-counts stand for, up to a constant, `(heads,)`."""
    per_component = log_priors - 0.5 * (variances.log() + (spread + means.square()) / variances).sum(dim=-1)
    return PSEUDO_COUNTS * per_component.sum(dim=-1)


def chunks(samples: Tensor, num_components: int) -> Iterator[Tensor]:
    """The samples in pieces whose table of components is not too large."""
    return iter(samples.split(max(1, LARGEST_TABLE // (samples.shape[0] * num_components)), dim=1))


def sum_over_chunks(samples: Tensor, num_components: int, function) -> Tensor:
    """The sum of what `function` makes of each piece."""
    return sum(function(chunk) for chunk in chunks(samples, num_components))


def wide_dtype(device: torch.device) -> torch.dtype:
    """In which numbers sums over all samples are kept: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x > 0."""
    return x + torch.log(-torch.expm1(-x))
