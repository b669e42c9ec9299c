# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The states at the borders of chunks.

The length is cut into chunks of T tokens, and into segments of several chunks; segments run in parallel. Forwards, over keys
and values, with A_n the decay over chunk n and t_j the decay from token j to the end of the chunk:

    S_{n+1} = A_n S_n + sum_{j in n} t_j w_j gamma^K_j v_j^T                              (z likewise with v_j = 1)

Backwards, over queries and gradients of the output, the same in the other direction, with e_i, the decay from the start of
the chunk, and D_i, the denominator of the read (whose gradient may also come from outside, if it is an output):

    G_{n-1} = A_n G_n + sum_{i in n} e_i gamma^Q_i do_i^T / D_i                           (g with dD_i = -do_i . o_i / D_i)

X [B, HX, N, CP] (responsibilities of keys or queries), Y [B, HY, N, DV] (values or do). ChunkStates [B * M, chunks, CP, DVP]
float16 times ChunkScales (float32 if EXACT): S before every chunk, or G after it; ChunkNorms [B * M, chunks, CP] float32.
Backwards also DecaySums [B * M, 2, N]: running sums of log-decays and counts of resets within the chunks.

A sequence with one segment takes one pass. Otherwise the first pass computes the writes of every segment (not CHUNKS), then
follows a running sum over the segments, and then the chunks. States [B * M, segments, CP * DVP + CP] float32: S row by row,
and then z.
"""

import triton
import triton.language as tl

from .tiles import (
    UNIT,
    add_column_sums,
    here,
    load_decays,
    load_row,
    load_tile,
    operand,
    product,
    store_row,
    tile_scale,
)


@triton.jit
def row_products(
    Y, Output, first, columns, stride_y, stride_o, count, DV, T: tl.constexpr, EVEN_V: tl.constexpr
):  # fmt: skip
    """y_i . o_i of some columns, [T]."""
    y = load_tile(Y, first, columns, stride_y, count, DV, T, EVEN_V).to(tl.float32)
    return tl.sum(y * load_tile(Output, first, columns, stride_o, count, DV, T, EVEN_V).to(tl.float32), 1)


@triton.jit(do_not_specialize=["N", "M", "segments", "chunks_per_segment", "y_groups"])
def states_kernel(
    X, Y, Output, RD, GradNormalizer, W, LA, First, States, SegmentDecays, ChunkStates, ChunkNorms, ChunkScales, LargestY, DecaySums,
    stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn, stride_ob, stride_oh, stride_on,
    stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an,
    N, DV, M, segments, chunks_per_segment, y_groups,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    EVEN_V: tl.constexpr, REVERSE: tl.constexpr, CHUNKS: tl.constexpr, HAS_FIRST: tl.constexpr, LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_Z: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_GRAD_NORMALIZER: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    The states of one segment, chunk by chunk. REVERSE: X, Y are queries and do, with R heads per mixture; otherwise keys and
    values. CHUNKS: store every state, and the last state only if LAST; otherwise store the writes of the segment.
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = CP // BC
    DVP: tl.constexpr = NV * BV
    SIZE: tl.constexpr = CP * (DVP + 1)
    v, c = program % NV, (program // NV) % blocks
    segment = (program // (NV * blocks)) % segments
    bm = (program // (NV * blocks)) // segments
    batch, mixture = (bm // M).to(tl.int64), bm % M
    slab = bm.to(tl.int64)
    chunks = tl.cdiv(N, T)
    begin = segment * chunks_per_segment
    steps = tl.minimum(chunks_per_segment, chunks - begin)
    columns, components = v * BV + tl.arange(0, BV), c * BC + tl.arange(0, BC)
    of_state = components[:, None] * DVP + columns[None, :]
    if HAS_WEIGHT:
        W += batch * stride_wb + mixture.to(tl.int64) * stride_wh
    if HAS_DECAY:
        LA += batch * stride_ab + mixture.to(tl.int64) * stride_ah

    S = tl.zeros([BC, BV], tl.float32)
    z = tl.zeros([BC], tl.float32)
    largest_state = 0.0
    if HAS_FIRST:
        First += (slab * segments + segment) * SIZE
        S = tl.load(First + of_state)
        z = tl.load(First + CP * DVP + components)
        for other in tl.static_range(blocks):  # all blocks of components share a scale
            rows = other * BC + tl.arange(0, BC)
            part = tl.load(First + rows[:, None] * DVP + columns[None, :])
            largest_state = tl.maximum(largest_state, tl.max(tl.max(tl.abs(part), 1), 0))
    log_decay = 0.0
    num_resets = 0.0
    for i in tl.range(steps, disable_licm=True):
        if REVERSE:
            chunk = begin + steps - 1 - i
        else:
            chunk = begin + i
        first = chunk * T
        count = N - first
        if CHUNKS:
            state = slab * chunks + chunk
            scale = tile_scale(largest_state, EXACT)
            tl.store(ChunkStates + state * CP * DVP + here(of_state, chunk), operand(S * scale, EXACT))
            if HAS_Z:
                if v == 0:
                    tl.store(ChunkNorms + state * CP + here(components, chunk), z)
            if c == 0:
                tl.store(ChunkScales + (slab * NV + v) * chunks + chunk, scale)
        weight = (tl.arange(0, T) < count).to(tl.float32)
        if HAS_WEIGHT and not REVERSE:
            weight = load_row(W, first, stride_wn, count, 0.0, T)
        counts = weight > 0
        if HAS_DECAY:
            sums, resets, total, total_resets = load_decays(LA, first, stride_an, count, T)
            keep = tl.where(total_resets == 0.0, tl.exp2(total), 0.0)
            if REVERSE and CHUNKS:  # the gradients of the chunk need them
                if v == 0 and c == 0:
                    store_row(DecaySums + 2 * slab * N, sums, first, count, T)
                    store_row(DecaySums + (2 * slab + 1) * N, resets, first, count, T)
            S *= keep
            z *= keep
            largest_state *= keep
            log_decay += total
            num_resets += total_resets
            if REVERSE:
                weight *= tl.where(resets == 0.0, tl.exp2(sums), 0.0)
            else:
                weight *= tl.where(resets == total_resets, tl.exp2(total - sums), 0.0)
        heaviest = tl.max(weight, 0)
        for r in range(R):
            head = mixture * R + r if REVERSE else mixture
            yh = head if REVERSE else mixture // y_groups
            gamma = load_tile(
                X + batch * stride_xb + head.to(tl.int64) * stride_xh, first, components, stride_xn, count, CP, T, True
            )
            y = load_tile(
                Y + batch * stride_yb + yh.to(tl.int64) * stride_yh, first, columns, stride_yn, count, DV, T, EVEN_V
            )
            y = y.to(tl.float32)
            if HAS_WEIGHT and not REVERSE:  # padding may hold anything
                y = tl.where(counts[:, None], y, 0.0)
            z_weight = weight
            token = (batch * M * R + head) * N
            if NORMALIZE:
                rd = load_row(RD + token, first, 1, count, 0.0, T)
                if HAS_Z:
                    grad = tl.zeros([T], tl.float32)
                    for vb in tl.static_range(NV):
                        grad -= row_products(
                            Y + batch * stride_yb + head.to(tl.int64) * stride_yh,
                            Output + batch * stride_ob + head.to(tl.int64) * stride_oh,
                            first, vb * BV + tl.arange(0, BV), stride_yn, stride_on, count, DV, T, EVEN_V,
                        )  # fmt: skip
                    grad *= rd
                    if HAS_GRAD_NORMALIZER:
                        grad += load_row(GradNormalizer + token, first, 1, count, 0.0, T)
                    z_weight *= grad
                y *= rd[:, None]
            largest = tl.max(tl.max(tl.abs(y), 1), 0)
            if c == 0:
                of_chunk = (batch * M * R + head) * NV + v if REVERSE else slab * NV + v
                tl.store(LargestY + of_chunk * chunks + chunk, largest)
            y_scale = tile_scale(largest * heaviest, EXACT)
            transposed = tl.trans(gamma)
            written = product(transposed, operand(y * (weight * y_scale)[:, None], EXACT), PRECISION)
            S += written * (1.0 / (UNIT * y_scale))
            largest_state += T * heaviest * largest
            if HAS_Z and (NORMALIZE or not REVERSE):
                z_scale = tile_scale(tl.max(tl.abs(z_weight), 0), EXACT)
                added = add_column_sums(
                    tl.zeros([BC], tl.float32), transposed, operand(z_weight * z_scale, EXACT), PRECISION
                )
                z += added * (1.0 / (UNIT * z_scale))

    if not CHUNKS or LAST:
        States += (slab * segments + segment) * SIZE
        tl.store(States + of_state, S)
        if v == 0:
            tl.store(States + CP * DVP + components, z)
    if HAS_DECAY and not CHUNKS:
        if v == 0 and c == 0:
            whole = tl.where(num_resets == 0.0, tl.exp2(log_decay), 0.0)
            tl.store(SegmentDecays + slab * segments + segment, whole)


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    States, SegmentDecays, First, Last, segments, SIZE,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """
    Replace the writes of every segment by the state before it (after it, if REVERSE); also store the state at the end.

    ROWS segments are loaded at a time, so that loads do not wait for each other. One warp has all rows of a column in the
    registers of one thread, so selecting a row costs next to nothing.
    """
    slab = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    mask = offsets < SIZE
    States += slab * segments * SIZE
    if HAS_DECAY:
        SegmentDecays += slab * segments
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
