# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The mixture as the map that gives the logits of the components, and the way back to its parameters.

    logits_c = sum_m [ linear_cm x_m + quadratic_cm x_m^2 ] + bias_c
    linear = mu p,    quadratic = -p / 2,    bias_c = log pi_c - 1/2 sum_m [ mu_cm^2 p_cm - log p_cm ],    p = 1 / sigma^2

with pi = softmax(prior_logits) and sigma^2 = softplus(raw_variances) + variance_floor. From each of the three its average
over the components is subtracted, in float32: softmax does not see it, and what remains is small where components are
alike, so that 16-bit products keep the differences between them. Logits are in base 2. Backwards, from the gradients of
linear, quadratic and bias (written dL, dQ, db):

    dmu = p (dL - db mu),    dp = dL mu - dQ / 2 - db mu^2 / 2,    dsigma^2 = -p^2 dp - p db / 2,    dalpha = db - pi sum db

means, raw_variances [M, C, D], prior_logits [M, C] -> coefficients [M, 4, CP, DP] bfloat16 (linear, quadratic, and what
rounding took from each) or, for EXACT kernels, [M, 2, CP, DP] float32; bias [M, CP] float32, -1e30 where padded.
"""

import triton
import triton.language as tl

from .tiles import LOG2E, rounded


@triton.jit
def softplus(x):
    """log(1 + e^x), accurate also for small e^x."""
    grown = tl.exp(tl.minimum(x, 20.0))
    sum_ = 1.0 + grown
    logarithm = tl.where(sum_ == 1.0, grown, tl.log(sum_) * (grown / tl.maximum(sum_ - 1.0, 1e-30)))
    return tl.where(x > 20.0, x, logarithm)


@triton.jit
def log_priors(Priors, components, C, CP: tl.constexpr):
    """log softmax of the prior logits [CP], -inf where padded."""
    logits = tl.load(Priors + components, mask=components < C, other=-float("inf")).to(tl.float32)
    logits = logits - tl.max(logits, 0)
    return logits - tl.log(tl.sum(tl.exp(logits), 0))


@triton.jit
def load_centred(Means, RawVariances, offsets, mask, variance_floor, C):
    """linear and quadratic of some dimensions [CP, BD] in base 2, and their share of the bias [CP] in base e."""
    means = tl.load(Means + offsets, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(RawVariances + offsets, mask=mask, other=0.0).to(tl.float32)
    precisions = tl.where(mask, 1.0 / (softplus(raw) + variance_floor), 0.0)
    linear = means * precisions
    constant = tl.where(mask, means * linear - tl.log(tl.where(mask, precisions, 1.0)), 0.0)
    bias = -0.5 * tl.sum(tl.where(mask, constant - tl.sum(constant, 0)[None, :] / C, 0.0), 1)
    quadratic = tl.where(mask, -0.5 * LOG2E * (precisions - tl.sum(precisions, 0)[None, :] / C), 0.0)
    linear = tl.where(mask, LOG2E * (linear - tl.sum(linear, 0)[None, :] / C), 0.0)
    return linear, quadratic, bias


@triton.jit
def coefficients_kernel(
    Means, RawVariances, Priors, Coefficients, Bias, variance_floor, C, D,
    CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    mixture = tl.program_id(0).to(tl.int64)
    components = tl.arange(0, CP)
    Means += mixture * C * D
    RawVariances += mixture * C * D
    parts: tl.constexpr = 2 if EXACT else 4
    Coefficients += mixture * parts * CP * DP
    bias = log_priors(Priors + mixture * C, components, C, CP)
    for block in range(DP // BD):
        columns = block * BD + tl.arange(0, BD)
        offsets = components[:, None] * D + columns[None, :]
        mask = (components < C)[:, None] & (columns < D)[None, :]
        linear, quadratic, share = load_centred(Means, RawVariances, offsets, mask, variance_floor, C)
        bias += share
        to = components[:, None] * DP + columns[None, :]
        if EXACT:
            tl.store(Coefficients + to, linear)
            tl.store(Coefficients + CP * DP + to, quadratic)
        else:
            main_linear, main_quadratic = rounded(linear, tl.bfloat16), rounded(quadratic, tl.bfloat16)
            tl.store(Coefficients + to, main_linear)
            tl.store(Coefficients + CP * DP + to, main_quadratic)
            tl.store(Coefficients + 2 * CP * DP + to, rounded(linear - main_linear.to(tl.float32), tl.bfloat16))
            tl.store(Coefficients + 3 * CP * DP + to, rounded(quadratic - main_quadratic.to(tl.float32), tl.bfloat16))
    tl.store(Bias + mixture * CP + components, tl.where(components < C, bias * LOG2E, -1e30))


@triton.jit(do_not_specialize=["num_parts", "M"])
def coefficients_backward_kernel(
    Means, RawVariances, Priors, GradLinear, GradQuadratic, GradBias, GradMeans, GradRawVariances, GradPriors,
    variance_floor, C, D, num_parts, M,
    CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of means, raw variances and priors from partial sums [num_parts, M, CP, DP] and [num_parts, M, CP]."""
    mixture = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    components = tl.arange(0, CP)
    columns = block * BD + tl.arange(0, BD)
    part = mixture * CP * DP + components[:, None] * DP + columns[None, :]
    grad_linear = tl.zeros([CP, BD], tl.float32)
    grad_quadratic = tl.zeros([CP, BD], tl.float32)
    grad_bias = tl.zeros([CP], tl.float32)
    step = M.to(tl.int64) * CP * DP
    for i in range(num_parts):
        grad_linear += tl.load(GradLinear + i * step + part)
        grad_quadratic += tl.load(GradQuadratic + i * step + part)
        grad_bias += tl.load(GradBias + (i * M + mixture) * CP + components)

    offsets = mixture * C * D + components[:, None] * D + columns[None, :]
    mask = (components < C)[:, None] & (columns < D)[None, :]
    means = tl.load(Means + offsets, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(RawVariances + offsets, mask=mask, other=0.0).to(tl.float32)
    precisions = 1.0 / (softplus(raw) + variance_floor)
    by_bias = grad_bias[:, None]
    grad_means = precisions * (grad_linear - by_bias * means)
    grad_precisions = means * (grad_linear - 0.5 * by_bias * means) - 0.5 * grad_quadratic
    grad_variances = -precisions * (precisions * grad_precisions + 0.5 * by_bias)
    grad_raw = grad_variances * tl.sigmoid(raw)
    tl.store(GradMeans + offsets, rounded(grad_means, GradMeans.dtype.element_ty), mask=mask)
    tl.store(GradRawVariances + offsets, rounded(grad_raw, GradRawVariances.dtype.element_ty), mask=mask)
    if block == 0:
        priors = tl.exp(log_priors(Priors + mixture * C, components, C, CP))
        grad_priors = grad_bias - priors * tl.sum(grad_bias, 0)
        to = GradPriors + mixture * C + components
        tl.store(to, rounded(grad_priors, GradPriors.dtype.element_ty), mask=components < C)
