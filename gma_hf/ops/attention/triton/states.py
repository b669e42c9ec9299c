# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The states at the borders of segments: what each segment writes, then a running sum over the segments.

The length is cut into chunks of T tokens and segments of several chunks; segments run in parallel. Forwards, over keys and
values, with A_s the decay over segment s and t_j the decay from token j to the segment's end:

    W_s = sum_{j in s} t_j w_j gamma^K_j v_j^T,    S_{s+1} = A_s S_s + W_s          (z likewise with v_j = 1)

Backwards, over queries and output gradients, the same with e_i, the decay from the segment's start, in the other
direction, and D_i, the denominator of the read (whose gradient may also come from outside, where it is an output):

    W_s = sum_{i in s} e_i gamma^Q_i do_i^T / D_i,    G_{s-1} = A_s G_s + W_s       (g with dD_i = -do_i . o_i / D_i)

X [B, HX, N, D] (keys or queries), Y [B, HY, N, DV] (values or do). States [B * M * NV, segments, CP * BV + CP] float32: S
and z behind it; value dimensions beyond BV are further rows of the first axis. Also kept: lse [B, M, N], the base-2
log-normaliser of every key's responsibilities.
"""

import triton
import triton.language as tl

from .tiles import (
    UNIT,
    add_column_sums,
    find_largest,
    load_coefficients,
    load_decays,
    load_row,
    load_tile,
    operand,
    product,
    responsibilities,
    responsibilities_again,
    store_row,
    tile_logits,
    tile_scale,
)


@triton.jit(do_not_specialize=["N", "M", "segments", "chunks_per_segment", "chunks", "x_groups", "y_groups"])
def write_kernel(
    X, Y, Output, RD, GradNormalizer, W, LA, Coefficients, Bias, States, SegmentDecays, LSE, LargestY, LargestW,
    stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn, stride_ob, stride_oh, stride_on,
    stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an,
    N, D, DV, M, segments, chunks_per_segment, chunks, x_groups, y_groups,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr,
    REVERSE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_GRAD_NORMALIZER: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one segment writes. REVERSE: X, Y are queries and do, R heads of them a mixture; else keys and values."""
    program = tl.program_id(0)
    v = program % NV
    segment = (program // NV) % segments
    bm = (program // NV) // segments
    batch, mixture = (bm // M).to(tl.int64), bm % M
    slab = (bm * NV + v).to(tl.int64)
    parts: tl.constexpr = 2 if EXACT else 4
    Coefficients += mixture.to(tl.int64) * parts * CP * DP
    bias = tl.load(Bias + mixture * CP + tl.arange(0, CP))
    linear, quadratic, linear_rest, quadratic_rest = load_coefficients(Coefficients, 0, CP, DP, BD, EXACT)
    columns = v * BV + tl.arange(0, BV)
    if HAS_WEIGHT:
        W += batch * stride_wb + mixture.to(tl.int64) * stride_wh
    if HAS_DECAY:
        LA += batch * stride_ab + mixture.to(tl.int64) * stride_ah

    S = tl.zeros([CP, BV], tl.float32)
    z = tl.zeros([CP], tl.float32)
    log_decay = 0.0
    num_resets = 0.0
    for i in tl.range(chunks_per_segment, disable_licm=True):
        if REVERSE:
            chunk = segment * chunks_per_segment + (chunks_per_segment - 1 - i)
        else:
            chunk = segment * chunks_per_segment + i
        first = chunk * T
        count = N - first
        weight = (tl.arange(0, T) < count).to(tl.float32)
        counts = weight
        if HAS_DECAY:
            sums, resets, total, total_resets = load_decays(LA, first, stride_an, count, T)
            keep = tl.where(total_resets == 0.0, tl.exp2(total), 0.0)
            S *= keep
            z *= keep
            log_decay += total
            num_resets += total_resets
            if REVERSE:
                weight *= tl.where(resets == 0.0, tl.exp2(sums), 0.0)
            else:
                weight *= tl.where(resets == total_resets, tl.exp2(total - sums), 0.0)
        if HAS_WEIGHT and not REVERSE:
            write_weight = load_row(W, first, stride_wn, count, 0.0, T)
            weight *= write_weight
            counts = write_weight
            if v == 0 and chunk < chunks:
                tl.store(LargestW + bm.to(tl.int64) * chunks + chunk, tl.max(write_weight, 0))
        for r in range(R):
            head = mixture * R + r if REVERSE else mixture
            xh = (head // x_groups).to(tl.int64)
            yh = (head // y_groups).to(tl.int64)
            logits = tile_logits(
                X + batch * stride_xb + xh * stride_xh, first, stride_xn, count, D, Coefficients, bias,
                linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
            )  # fmt: skip
            token = (batch * M * R + head).to(tl.int64) * N
            if REVERSE:
                lse = load_row(LSE + token, first, 1, count, float("inf"), T)
                gamma = responsibilities_again(logits, lse)
            else:
                gamma, lse = responsibilities(logits)
                if v == 0:
                    store_row(LSE + token, lse, first, count, T)
            y = load_tile(Y + batch * stride_yb + yh * stride_yh, first, columns, stride_yn, count, DV, T, EVEN_V)
            y = y.to(tl.float32)
            z_weight = weight
            if NORMALIZE:
                o = load_tile(
                    Output + batch * stride_ob + yh * stride_oh, first, columns, stride_on, count, DV, T, EVEN_V
                )
                rd = load_row(RD + token, first, 1, count, 0.0, T)
                z_weight = -tl.sum(y * o.to(tl.float32), 1) * (rd * weight)
                if HAS_GRAD_NORMALIZER:
                    if v == 0:  # the blocks of the value dimensions add up
                        z_weight += load_row(GradNormalizer + token, first, 1, count, 0.0, T) * weight
                y *= rd[:, None]
            gamma = tl.trans(operand(gamma, EXACT))
            largest = find_largest(y, counts)
            if not REVERSE:
                if chunk < chunks:
                    tl.store(LargestY + slab * chunks + chunk, largest)
            scale = tile_scale(largest * tl.max(weight, 0), EXACT)
            written = product(gamma, operand(y * (weight * scale)[:, None], EXACT), PRECISION)
            S += written * (1.0 / (UNIT * scale))
            if NORMALIZE or not REVERSE:
                z_scale = tile_scale(tl.max(tl.abs(z_weight), 0), EXACT)
                columns_sum = tl.zeros([CP], tl.float32)
                columns_sum = add_column_sums(columns_sum, gamma, operand(z_weight * z_scale, EXACT), PRECISION)
                z += columns_sum * (1.0 / (UNIT * z_scale))

    States += (slab * segments + segment) * CP * (BV + 1)
    tl.store(States + tl.arange(0, CP)[:, None] * BV + tl.arange(0, BV)[None, :], S)
    tl.store(States + CP * BV + tl.arange(0, CP), z)
    if v == 0:
        whole = tl.where(num_resets == 0.0, tl.exp2(log_decay), 0.0)
        tl.store(SegmentDecays + bm.to(tl.int64) * segments + segment, whole)


@triton.jit(do_not_specialize=["segments", "slabs_per_decay"])
def scan_kernel(
    States, SegmentDecays, First, Last, segments, SIZE, slabs_per_decay,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """Replace what every segment writes by the state before it (after it, if REVERSE); also the state at the end.

    ROWS segments are loaded at a time, so that loads do not wait for each other. One warp has all rows of a column in the
    registers of one thread: picking a row costs next to nothing.
    """
    slab = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    mask = offsets < SIZE
    States += slab * segments * SIZE
    if HAS_DECAY:
        SegmentDecays += (slab // slabs_per_decay) * segments
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        state = tl.load(First + slab * SIZE + offsets, mask=mask, other=0.0)
    for first in range(0, segments, ROWS):
        exists = first + rows < segments
        places = segments - 1 - (first + rows) if REVERSE else first + rows
        pointers = States + places[:, None].to(tl.int64) * SIZE + offsets[None, :]
        in_both = exists[:, None] & mask[None, :]
        written = tl.load(pointers, mask=in_both, other=0.0)
        if HAS_DECAY:
            decays = tl.load(SegmentDecays + places, mask=exists, other=1.0)
        states = written
        for row in tl.static_range(ROWS):
            is_row = rows == row
            states = tl.where(is_row[:, None], state[None, :], states)
            if HAS_DECAY:
                state *= tl.sum(tl.where(is_row, decays, 0.0), 0)
            state += tl.sum(tl.where(is_row[:, None], written, 0.0), 0)
        tl.store(pointers, states, mask=in_both)
    tl.store(Last + slab * SIZE + offsets, state, mask=mask)
