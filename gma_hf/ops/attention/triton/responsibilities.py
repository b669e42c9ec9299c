# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Responsibilities in memory, for the next kernels, which are kernels of linear attention; and their gradients.

    gamma = 2^(logits - log2 sum_c 2^logits_c),        logits = x @ linear^T + (x * x) @ quadratic^T + bias

Backwards, from dlogits = gamma (dgamma - gamma . dgamma), which `gradients` computes (the responsibility-modulated gradient
of the paper):

    dx = dlogits @ linear + 2 x (dlogits @ quadratic)
    dlinear = sum dlogits^T x,    dquadratic = sum dlogits^T x^2,    dbias = sum dlogits          over queries and keys

Q [B, HQ, NQ, D], K [B, HK, NK, D], coefficients and bias in the layout of `coefficients` -> GammaQ [B, HQ, NQ, CP], GammaK
[B, M, NK, CP], float16 times UNIT, or float32 times UNIT in EXACT kernels. One launch for queries and keys. With
correlation, rho replaces gamma, and the backward pass also needs LengthsQ [B, HQ, NQ] and LengthsK [B, M, NK], the divisors
of rho.
"""

import triton
import triton.language as tl

from .tiles import (
    LN2,
    add_column_sums,
    compute_tile,
    correlated,
    load_coefficients,
    load_tile,
    ones,
    product,
    responsibilities,
    square,
    square_rest,
    store_row,
    store_tile,
    tile_logits,
)


@triton.jit(do_not_specialize=["NQ", "NK", "M", "query_programs", "key_groups"])
def responsibilities_kernel(
    Q, K, Coefficients, Bias, GammaQ, GammaK, LengthsQ, LengthsK,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_gqb, stride_gqh, stride_gqn, stride_gkb, stride_gkh, stride_gkn,
    NQ, NK, C, D, M, query_programs, key_groups,
    R: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
    EVEN_D: tl.constexpr, CORRELATE: tl.constexpr, SAVE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Responsibilities of TILES times T tokens of a head, first of queries, then of keys."""
    program = tl.program_id(0)
    if program < query_programs:
        blocks = tl.cdiv(NQ, T * TILES)
        head = (program // blocks) % (M * R)
        batch = ((program // blocks) // (M * R)).to(tl.int64)
        mixture = head // R
        N = NQ
        stride, stride_g = stride_qn, stride_gqn
        X = Q + batch * stride_qb + head.to(tl.int64) * stride_qh
        Gamma = GammaQ + batch * stride_gqb + head.to(tl.int64) * stride_gqh
        if CORRELATE and SAVE:
            Lengths = LengthsQ + (batch * (M * R) + head) * NQ
        block = program % blocks
    else:
        program -= query_programs
        blocks = tl.cdiv(NK, T * TILES)
        mixture = (program // blocks) % M
        batch = ((program // blocks) // M).to(tl.int64)
        N = NK
        stride, stride_g = stride_kn, stride_gkn
        X = K + batch * stride_kb + (mixture // key_groups).to(tl.int64) * stride_kh
        Gamma = GammaK + batch * stride_gkb + mixture.to(tl.int64) * stride_gkh
        if CORRELATE and SAVE:
            Lengths = LengthsK + (batch * M + mixture) * NK
        block = program % blocks
    parts: tl.constexpr = 2 if EXACT else 4
    Coefficients += mixture.to(tl.int64) * parts * CP * DP
    bias = tl.load(Bias + mixture * CP + tl.arange(0, CP))
    linear, quadratic, linear_rest, quadratic_rest = load_coefficients(Coefficients, 0, CP, DP, BD, EXACT)
    for i in tl.range(TILES, disable_licm=True):
        first = (block * TILES + i) * T
        count = N - first
        logits = tile_logits(
            X, first, stride, count, D, Coefficients, bias,
            linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
        )  # fmt: skip
        gamma = responsibilities(logits)
        if CORRELATE:
            gamma, inverse_length = correlated(gamma, C, tl.arange(0, CP)[None, :])
            if SAVE:
                store_row(Lengths, 1.0 / inverse_length, first, count, T)
        store_tile(Gamma, gamma, first, tl.arange(0, CP), stride_g, count, CP, T, True)


@triton.jit(do_not_specialize=["B", "NQ", "NK", "M", "workers", "key_groups"])
def logit_gradients_kernel(
    Q, K, GradLogitsQ, GradLogitsK, Coefficients, GQ, GK, GradLinear, GradQuadratic, GradBias,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_gqb, stride_gqh, stride_gqn, stride_gkb, stride_gkh, stride_gkn,
    stride_dqb, stride_dqh, stride_dqn, stride_dkb, stride_dkh, stride_dkn,
    B, NQ, NK, D, M, workers, key_groups,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
    EVEN_D: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    dx of the tokens of a mixture, and partial sums for its parameters: `workers` programs for the queries, and as many for
    the keys. Each block of BD dimensions has its own programs.
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = DP // BD
    block = program % blocks
    mixture = (program // blocks) % M
    worker = (program // blocks) // M
    partial = (worker * M + mixture).to(tl.int64)
    if worker < workers:
        N, heads, head, x_head = NQ, R, mixture * R, mixture * R
        stride, stride_g, stride_d = stride_qn, stride_gqn, stride_dqn
        stride_b, stride_gb, stride_db = stride_qb, stride_gqb, stride_dqb
        stride_h, stride_gh, stride_dh = stride_qh, stride_gqh, stride_dqh
        X, GradLogits, GX = Q, GradLogitsQ, GQ
    else:
        worker -= workers
        N, heads, head, x_head = NK, 1, mixture, mixture // key_groups
        stride, stride_g, stride_d = stride_kn, stride_gkn, stride_dkn
        stride_b, stride_gb, stride_db = stride_kb, stride_gkb, stride_dkb
        stride_h, stride_gh, stride_dh = stride_kh, stride_gkh, stride_dkh
        X, GradLogits, GX = K, GradLogitsK, GK
    parts: tl.constexpr = 2 if EXACT else 4
    Coefficients += mixture.to(tl.int64) * parts * CP * DP
    linear, quadratic, linear_rest, quadratic_rest = load_coefficients(Coefficients, block, CP, DP, BD, EXACT)
    components, columns = tl.arange(0, CP), block * BD + tl.arange(0, BD)
    grad_linear = tl.zeros([CP, BD], tl.float32)
    grad_quadratic = tl.zeros([CP, BD], tl.float32)
    grad_bias = tl.zeros([CP], tl.float32)
    tiles = tl.cdiv(N, T)
    for item in tl.range(worker, B * heads * tiles, workers, disable_licm=True):
        first = (item % tiles) * T
        of_head = (item // tiles) % heads
        batch = ((item // tiles) // heads).to(tl.int64)
        count = N - first
        grad = load_tile(
            GradLogits + batch * stride_gb + (head + of_head).to(tl.int64) * stride_gh,
            first, components, stride_g, count, CP, T, True,
        )  # fmt: skip
        x = load_tile(
            X + batch * stride_b + (x_head + of_head).to(tl.int64) * stride_h,
            first,
            columns,
            stride,
            count,
            D,
            T,
            EVEN_D,
        )
        x = compute_tile(x, EXACT)
        by_square = product(grad, quadratic, PRECISION)
        if not EXACT:
            by_square = product(grad, quadratic_rest, PRECISION, by_square)
        by_x = 2.0 * x.to(tl.float32) * by_square
        if not EXACT:
            by_x = product(grad, linear_rest, PRECISION, by_x)
        by_x = product(grad, linear, PRECISION, by_x)
        transposed = tl.trans(grad)
        grad_linear = product(transposed, x, PRECISION, grad_linear)
        grad_quadratic = product(transposed, square(x, EXACT), PRECISION, grad_quadratic)
        if not EXACT:
            grad_quadratic = product(transposed, square_rest(x), PRECISION, grad_quadratic)
        grad_bias = add_column_sums(grad_bias, transposed, ones(T, grad.dtype), PRECISION)
        # The coefficients are in base 2
        store_tile(
            GX + batch * stride_db + (head + of_head).to(tl.int64) * stride_dh, by_x * LN2,
            first, columns, stride_d, count, D, T, EVEN_D,
        )  # fmt: skip
    of_mixture = partial * CP * DP + components[:, None] * DP + columns[None, :]
    tl.store(GradLinear + of_mixture, grad_linear)
    tl.store(GradQuadratic + of_mixture, grad_quadratic)
    if block == 0:
        tl.store(GradBias + partial * CP + components, grad_bias)
