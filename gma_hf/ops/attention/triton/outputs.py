# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Outputs from the states before every segment: the forward pass, second half, or all of it.

Where there are enough sequences and heads to fill the chip, a segment is a whole sequence (ONE_PASS), and nothing has to be
known about it beforehand: neither its state nor what `states` leaves in memory about its keys and values.

Within a segment the state is carried from chunk to chunk. i, j in one chunk, S the state before it, e_i and t_j the decays
from its start and to its end, A the decay over all of it:

    P_ij = gamma^Q_i . w_j gamma^K_j  exp(sum_{j < l <= i} log a_l)             j <= i
    D_i  = sum_j P_ij + e_i gamma^Q_i z + eps                                   1 if the read is not normalised
    o_i  = (sum_j P_ij v_j + e_i gamma^Q_i S) / D_i
    S   <- A S + sum_j t_j w_j gamma^K_j v_j^T,         z <- A z + sum_j t_j w_j gamma^K_j

Bidirectional: o_i = gamma^Q_i S / (gamma^Q_i z + eps) with the one state that all keys wrote.

Q [B, HQ, N, D], K [B, HK, N, D], V [B, HK, N, DV], O [B, HQ, N, DV], if asked for D_i [B, HQ, N]. For the backward pass: 1 / D_i and lse [B, HQ, N], and
per chunk z and S (float16 times a power of two, or float32 if EXACT).
"""

import triton
import triton.language as tl

from .tiles import (
    UNIT,
    add_column_sums,
    decayed,
    find_largest,
    here,
    load_coefficients,
    load_decays,
    load_row,
    load_tile,
    ones,
    operand,
    pair_decays,
    product,
    responsibilities,
    responsibilities_again,
    store_row,
    store_tile,
    tile_logits,
    tile_scale,
    visible_pairs,
)


@triton.jit(do_not_specialize=["N", "M", "segments", "chunks_per_segment", "chunks", "kv_groups"])
def read_kernel(
    Q, K, V, Output, Normalizer, RD, W, LA, Coefficients, Bias, States, Last, LSEQ, LSEK,
    LargestV, LargestW, ChunkStates, ChunkNorms, ChunkScales,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an,
    stride_state, N, D, DV, M, segments, chunks_per_segment, chunks, kv_groups, eps,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr,
    CAUSAL: tl.constexpr, ONE_PASS: tl.constexpr, HAS_STATE: tl.constexpr, STRICT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, NORMALIZE: tl.constexpr, OUTPUT_NORMALIZER: tl.constexpr,
    SAVE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    kv_head = (mixture // kv_groups).to(tl.int64)
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    LSEK += bm.to(tl.int64) * N
    LargestV += slab * chunks
    if HAS_WEIGHT:
        LargestW += bm.to(tl.int64) * chunks

    of_state = tl.arange(0, CP)[:, None] * BV + tl.arange(0, BV)[None, :]
    of_norm = tl.arange(0, CP)
    if HAS_STATE:
        States += slab * stride_state + (segment.to(tl.int64) * CP * (BV + 1) if CAUSAL else 0)
        S = tl.load(States + of_state)
        z = tl.load(States + CP * BV + of_norm)
        largest = tl.max(tl.max(tl.abs(S), 1), 0)
    else:
        S = tl.zeros([CP, BV], tl.float32)
        z = tl.zeros([CP], tl.float32)
        largest = 0.0
    for i in tl.range(chunks_per_segment, disable_licm=True):
        chunk = segment * chunks_per_segment + i
        first = chunk * T
        count = N - first
        # The state before the chunk
        S_scale = tile_scale(largest, EXACT)
        S_operand = operand(S * S_scale, EXACT)
        z_before = z
        if SAVE and CAUSAL:
            state = slab * chunks + chunk
            to, norm_to = here(of_state, chunk), here(of_norm, chunk)
            tl.store(ChunkStates + state * CP * BV + to, S_operand, mask=to * 0 + chunk < chunks)
            tl.store(ChunkNorms + state * CP + norm_to, z, mask=norm_to * 0 + chunk < chunks)
            if chunk < chunks:
                tl.store(ChunkScales + state, S_scale)
        if HAS_DECAY:
            sums, resets, total, total_resets = load_decays(LA, first, stride_an, count, T)
            from_start = tl.where(resets == 0.0, tl.exp2(sums), 0.0)

        pair_scale = UNIT  # of sum_j P_ij v_j
        if CAUSAL:
            # What the chunk writes, and the state after it
            logits = tile_logits(
                K, first, stride_kn, count, D, Coefficients, bias,
                linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
            )  # fmt: skip
            value = load_tile(V, first, columns, stride_vn, count, DV, T, EVEN_V).to(tl.float32)
            weight = (tl.arange(0, T) < count).to(tl.float32)
            if HAS_WEIGHT:
                weight = load_row(W, first, stride_wn, count, 0.0, T)
            # Beyond the last chunk nothing counts, whatever the scales are
            last = tl.minimum(chunk, chunks - 1)
            largest_weight = 1.0
            if ONE_PASS:
                gamma, lse = responsibilities(logits)
                gamma = tl.where((weight > 0)[:, None], gamma, 0.0)
                largest_value = find_largest(value, weight)
                tl.store(LargestV + last, largest_value)
                if v == 0:
                    store_row(LSEK, lse, first, count, T)
                if HAS_WEIGHT:
                    largest_weight = tl.max(weight, 0)
                    if v == 0:
                        tl.store(LargestW + last, largest_weight)
            else:
                gamma = responsibilities_again(logits, load_row(LSEK, first, 1, count, float("inf"), T))
                largest_value = tl.load(LargestV + last)
                if HAS_WEIGHT:
                    largest_weight = tl.load(LargestW + last)
            value_scale = tile_scale(largest_value, EXACT)
            value *= value_scale
            if HAS_WEIGHT and not EXACT:  # padding may hold anything
                value = tl.clamp(value, -32768.0, 32768.0)
            value = operand(value, EXACT)
            weight_scale = 1.0
            if HAS_WEIGHT:
                weight_scale = tile_scale(largest_weight, EXACT) * (1.0 if EXACT else 1.0 / UNIT)
                gamma *= (weight * weight_scale)[:, None]
            written = operand(gamma, EXACT)
            kept = written
            if HAS_DECAY:
                to_end = tl.where(resets == total_resets, tl.exp2(total - sums), 0.0)
                kept = operand(gamma * to_end[:, None], EXACT)
                keep = tl.where(total_resets == 0.0, tl.exp2(total), 0.0)
                S *= keep
                z *= keep
                largest *= keep
            pair_scale = weight_scale * UNIT * value_scale
            kept = tl.trans(kept)
            S += product(kept, value, PRECISION) * (1.0 / pair_scale)
            largest += T * largest_weight * largest_value
            z_written = add_column_sums(tl.zeros([CP], tl.float32), kept, ones(T, kept.dtype), PRECISION)
            z += z_written * (1.0 / (weight_scale * UNIT))
            if HAS_DECAY:
                decays = pair_decays(sums, resets, first, T, STRICT)
            else:
                decays = visible_pairs(first, T, STRICT)

        for r in range(R):
            head = mixture * R + r
            logits = tile_logits(
                Q + batch * stride_qb + head.to(tl.int64) * stride_qh, first, stride_qn, count, D, Coefficients, bias,
                linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
            )  # fmt: skip
            gamma_query, lse = responsibilities(logits)
            token = (batch * M * R + head).to(tl.int64) * N
            if SAVE:
                if v == 0:
                    store_row(LSEQ + token, lse, first, count, T)
            if NORMALIZE:
                denominator = tl.sum(gamma_query * z_before[None, :], 1) * (1.0 / UNIT)
                if HAS_DECAY:
                    denominator *= from_start
            query = operand(gamma_query, EXACT)
            read = product(query, S_operand, PRECISION)
            read_scale = pair_scale / (UNIT * S_scale)
            if HAS_DECAY:
                read *= (from_start * read_scale)[:, None]
            else:
                read *= read_scale
            if CAUSAL:
                pairs = decayed(product(query, tl.trans(written), PRECISION), decays, HAS_DECAY)
                if NORMALIZE:
                    denominator += tl.sum(pairs, 1) * (1.0 / (weight_scale * UNIT * UNIT))
                read = product(operand(pairs * (1.0 / UNIT), EXACT), value, PRECISION, read)
            if NORMALIZE:
                reciprocal = 1.0 / (denominator + eps)
                if OUTPUT_NORMALIZER:
                    if v == 0:
                        store_row(Normalizer + token, denominator + eps, first, count, T)
                if SAVE:
                    if v == 0:
                        store_row(RD + token, reciprocal, first, count, T)
                read *= (reciprocal * (1.0 / pair_scale))[:, None]
            else:
                read *= 1.0 / pair_scale
            store_tile(
                Output + batch * stride_ob + head.to(tl.int64) * stride_oh, read,
                first, columns, stride_on, count, DV, T, EVEN_V,
            )  # fmt: skip
    if ONE_PASS:
        Last += slab * CP * (BV + 1)
        tl.store(Last + of_state, S)
        tl.store(Last + CP * BV + of_norm, z)
