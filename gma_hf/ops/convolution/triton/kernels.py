# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The depthwise short convolution in fused GPU kernels, token-major: tokens are rows, and channels are adjacent in memory.

    convolve_kernel     y_p = SiLU(s_p),  s_p = sum_j w_j x_{p+j-b}         also dx_t = sum_j w_j ds_{t-j+b}
    grad_kernel         ds_p = dy_p SiLU'(s_p),  and over a segment dw_j = sum_p ds_p x_{p+j-b}

An output at p reads b tokens before p. Tokens outside of a tensor count as zeros, and tokens of other sequences do not
count. A program computes a segment of the tokens and a block of the channels in tiles [T, BC]. A tile is loaded once per
tap, but from memory only once. The kernels use no atomics, so the same call gives the same bits. All arithmetic is float32.

x [B, N, C] from position 0, y and dy [B, NY, C] from position `first` (ds and dx likewise), w [C, K], runs [B, N].
"""

import triton
import triton.language as tl

from ...attention.triton.tiles import rounded


@triton.jit
def locate(program, segments, C, SEGMENT: tl.constexpr, BC: tl.constexpr):
    """
    First token, channels [BC] and batch. Programs with the same tokens run side by side, because their rows are adjacent.
    """
    column_blocks = tl.cdiv(C, BC)
    columns = program % column_blocks * BC + tl.arange(0, BC)
    start = program // column_blocks % segments * SEGMENT
    return start, columns, (program // (column_blocks * segments)).to(tl.int64)


@triton.jit
def load_weights(Weight, columns, C, K: tl.constexpr):
    """A tuple of w_0 .. w_{K-1}, [BC] each."""
    weights = ()
    for tap in tl.static_range(K):
        weights += (tl.load(Weight + columns * K + tap, mask=columns < C, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def load_rows(pointer, rows, columns, stride, is_there, C, EVEN: tl.constexpr):
    """Some rows of a matrix, zeros where `is_there` is `False`."""
    mask = is_there[:, None]
    if not EVEN:
        mask = mask & (columns < C)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, x, rows, columns, stride, is_there, C, EVEN: tl.constexpr):
    mask = is_there[:, None]
    if not EVEN:
        mask = mask & (columns < C)[None, :]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, rounded(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_taps(
    X, Runs, positions, is_there, columns, stride, first, N, C, before,
    K: tl.constexpr, DIRECTION: tl.constexpr, HAS_RUNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """
    A tuple of the inputs of the taps at positions [T], [T, BC] each: for tap j the token `before` - j before, or, with
    DIRECTION = -1, after. The rows of X are the positions from `first` on.
    """
    runs = positions
    if HAS_RUNS:
        runs = tl.load(Runs + positions, mask=is_there, other=0)
    taps = ()
    for tap in tl.static_range(K):
        seen = positions + DIRECTION * (tap - before)
        is_seen = is_there & (seen >= first) & (seen < first + N)
        if HAS_RUNS:
            is_seen = is_seen & (tl.load(Runs + seen, mask=is_seen, other=0) == runs)
        taps += (load_rows(X, seen - first, columns, stride, is_seen, C, EVEN),)
    return taps


@triton.jit
def weighted_sum(taps, weights, K: tl.constexpr):
    total = taps[0].to(tl.float32) * weights[0][None, :]
    for tap in tl.static_range(1, K):
        total += taps[tap].to(tl.float32) * weights[tap][None, :]
    return total


@triton.jit(do_not_specialize=["first_x", "N", "first_y", "NY", "before", "segments"])
def convolve_kernel(
    X, Weight, Runs, Y, stride_xb, stride_xt, stride_yb, stride_yt, stride_runs,
    first_x, N, first_y, NY, C, before, segments,
    K: tl.constexpr, DIRECTION: tl.constexpr, ACTIVATE: tl.constexpr, HAS_RUNS: tl.constexpr, EVEN: tl.constexpr,
    SEGMENT: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    start, columns, batch = locate(tl.program_id(0), segments, C, SEGMENT, BC)
    X += batch * stride_xb
    Y += batch * stride_yb
    Runs += batch * stride_runs
    weights = load_weights(Weight, columns, C, K)
    for tile in tl.range(0, tl.cdiv(tl.minimum(SEGMENT, NY - start), T)):
        rows = start + tile * T + tl.arange(0, T)
        taps = load_taps(
            X, Runs, first_y + rows, rows < NY, columns, stride_xt, first_x, N, C, before, K, DIRECTION, HAS_RUNS, EVEN,
        )  # fmt: skip
        y = weighted_sum(taps, weights, K)
        if ACTIVATE:
            y *= tl.sigmoid(y)
        store_rows(Y, y, rows, columns, stride_yt, rows < NY, C, EVEN)


@triton.jit(do_not_specialize=["N", "first_y", "NY", "before", "segments"])
def grad_kernel(
    X, Weight, Runs, GradY, GradSum, GradWeight,
    stride_xb, stride_xt, stride_gb, stride_gt, stride_sb, stride_st, stride_runs,
    N, first_y, NY, C, before, segments,
    K: tl.constexpr, HAS_RUNS: tl.constexpr, EVEN: tl.constexpr,
    SEGMENT: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    start, columns, batch = locate(tl.program_id(0), segments, C, SEGMENT, BC)
    X += batch * stride_xb
    GradY += batch * stride_gb
    GradSum += batch * stride_sb
    Runs += batch * stride_runs
    weights = load_weights(Weight, columns, C, K)
    totals = ()
    for _ in tl.static_range(K):
        totals += (tl.zeros([T, BC], tl.float32),)
    for tile in tl.range(0, tl.cdiv(tl.minimum(SEGMENT, NY - start), T)):
        rows = start + tile * T + tl.arange(0, T)
        taps = load_taps(X, Runs, first_y + rows, rows < NY, columns, stride_xt, 0, N, C, before, K, 1, HAS_RUNS, EVEN)
        sums = weighted_sum(taps, weights, K)
        gate = tl.sigmoid(sums)
        grad = load_rows(GradY, rows, columns, stride_gt, rows < NY, C, EVEN).to(tl.float32)
        grad *= gate * (1.0 + sums * (1.0 - gate))
        store_rows(GradSum, grad, rows, columns, stride_st, rows < NY, C, EVEN)
        new_totals = ()
        for tap in tl.static_range(K):
            new_totals += (totals[tap] + grad * taps[tap].to(tl.float32),)
        totals = new_totals
    # Partial sums lie as [B * segments, K, C]
    GradWeight += (batch * segments + start // SEGMENT) * K * C
    for tap in tl.static_range(K):
        tl.store(GradWeight + tap * C + columns, tl.sum(totals[tap], 0), mask=columns < C)
