# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The last step of the forward pass: outputs from the states before every chunk. Chunks are independent of each other.

i, j are in one chunk, S and z are the state before it, e_i is the decay from its start:

    P_ij = gamma^Q_i . w_j gamma^K_j  exp(sum_{j < l <= i} log a_l)             j <= i
    D_i  = sum_j P_ij + e_i gamma^Q_i z + eps                                   1 if the read is not normalised
    o_i  = (sum_j P_ij v_j + e_i gamma^Q_i S) / D_i

Bidirectional: o_i = gamma^Q_i S / (gamma^Q_i z + eps) with the one state after all keys.

GammaQ [B, HQ, N, CP], GammaK [B, M, N, CP], V [B, HK, N, DV], states in the layout of `states` -> O [B, HQ, N, DV], if
requested D_i [B, HQ, N]; for the backward pass 1 / D_i.
"""

import triton
import triton.language as tl

from .tiles import (
    UNIT,
    decayed,
    load_decays,
    load_norm,
    load_row,
    load_state,
    load_tile,
    operand,
    pair_factors,
    product,
    store_row,
    store_tile,
    tile_scale,
)


@triton.jit(do_not_specialize=["N", "M", "kv_groups"])
def read_kernel(
    GammaQ, GammaK, V, Output, Normalizer, RD, W, LA, ChunkStates, ChunkNorms, ChunkScales, LargestV,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an,
    N, DV, M, kv_groups, eps,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, EVEN_V: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr, OUTPUT_NORMALIZER: tl.constexpr, SAVE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, for the R query heads of a mixture."""
    program = tl.program_id(0)
    chunks = tl.cdiv(N, T)
    chunk = program % chunks
    bm = program // chunks
    batch, mixture, slab = (bm // M).to(tl.int64), bm % M, bm.to(tl.int64)
    first = chunk * T
    count = N - first
    components = tl.arange(0, CP)
    if HAS_DECAY:
        sums, resets, _, _ = load_decays(
            LA + batch * stride_ab + mixture.to(tl.int64) * stride_ah, first, stride_an, count, T
        )
        from_start = tl.where(resets == 0.0, tl.exp2(sums), 0.0)
    if CAUSAL:
        gamma_key = load_tile(
            GammaK + batch * stride_kb + mixture.to(tl.int64) * stride_kh,
            first,
            components,
            stride_kn,
            count,
            CP,
            T,
            True,
        )
        weight = (tl.arange(0, T) < count).to(tl.float32)
        if HAS_WEIGHT:
            weight = load_row(
                W + batch * stride_wb + mixture.to(tl.int64) * stride_wh, first, stride_wn, count, 0.0, T
            )
        if not HAS_DECAY:
            sums = weight
            resets = weight
        factors = pair_factors(sums, resets, first, T, STRICT, HAS_DECAY)
    if NORMALIZE:
        z = load_norm(ChunkStates, ChunkNorms, slab, chunk, chunks, CP, NV * BV, CAUSAL)

    for r in range(R):
        head = mixture * R + r
        token = (batch * M * R + head) * N
        gamma_query = load_tile(
            GammaQ + batch * stride_qb + head.to(tl.int64) * stride_qh,
            first,
            components,
            stride_qn,
            count,
            CP,
            T,
            True,
        )
        reciprocal = tl.full([T], 1.0, tl.float32)
        if CAUSAL:
            pairs = product(gamma_query, tl.trans(gamma_key), PRECISION)
            pairs = decayed(pairs, 1.0, factors, HAS_DECAY)  # times UNIT
            pairs_operand = operand(pairs, EXACT)
        if NORMALIZE:
            denominator = tl.sum(gamma_query.to(tl.float32) * z[None, :], 1) * (1.0 / UNIT)
            if HAS_DECAY:
                denominator *= from_start
            if CAUSAL:
                if HAS_WEIGHT:
                    pairs *= weight[None, :]
                denominator += tl.sum(pairs, 1) * (1.0 / UNIT)
            denominator += eps
            reciprocal = 1.0 / denominator
            if OUTPUT_NORMALIZER:
                store_row(Normalizer + token, denominator, first, count, T)
            if SAVE:
                store_row(RD + token, reciprocal, first, count, T)
        for v in tl.static_range(NV):
            columns = v * BV + tl.arange(0, BV)
            state, state_scale = load_state(
                ChunkStates, ChunkScales, slab, chunk, chunks, v, CP, BV, NV, CAUSAL, EXACT
            )
            read = product(gamma_query, state, PRECISION) * (1.0 / (UNIT * state_scale))
            if HAS_DECAY:
                read *= from_start[:, None]
            if CAUSAL:
                largest = tl.load(LargestV + (slab * NV + v) * chunks + chunk)
                if HAS_WEIGHT:
                    largest *= tl.max(weight, 0)
                value_scale = tile_scale(largest, EXACT)
                value = load_tile(
                    V + batch * stride_vb + (mixture // kv_groups).to(tl.int64) * stride_vh,
                    first, columns, stride_vn, count, DV, T, EVEN_V,
                ).to(tl.float32)  # fmt: skip
                if HAS_WEIGHT:  # padding may hold anything
                    value = tl.where((weight > 0)[:, None], value * (weight * value_scale)[:, None], 0.0)
                else:
                    value *= value_scale
                read += product(pairs_operand, operand(value, EXACT), PRECISION) * (1.0 / (UNIT * value_scale))
            if NORMALIZE:
                read *= reciprocal[:, None]
            store_tile(
                Output + batch * stride_ob + head.to(tl.int64) * stride_oh, read,
                first, columns, stride_on, count, DV, T, EVEN_V,
            )  # fmt: skip
