# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The forward pass with responsibilities that never leave the chip. This is faster if one tile holds the state of a mixture.

One kernel computes what `responsibilities`, `states` and `outputs` compute. If there are enough sequences and heads to fill
the chip, the state is carried from chunk to chunk of a segment, and a segment is a whole sequence (ONE_PASS). Otherwise
`write_kernel` first computes the writes of every segment, and `scan_kernel` the states before the segments.

PACKED: a row has many sequences, one after the other, each with its own state. Sequence s of row b has the tokens Starts[b, s]
to Starts[b, s + 1]. It starts from S[slot], z[slot], and its last state replaces them; the slot is Slots[b, s], or the number
of the sequence. Nothing is copied: the kernel reads tokens and states where they are.

Q [B, HQ, N, D], K [B, HK, N, D], V [B, HK, N, DV] -> O [B, HQ, N, DV], if requested D_i [B, HQ, N]. For the backward pass
the same tensors as from `outputs` and `states`: 1 / D_i, S and z before every chunk, the largest value of every chunk.
"""

import triton
import triton.language as tl

from .tiles import (
    UNIT,
    add_column_sums,
    decayed,
    here,
    load_coefficients,
    load_decays,
    load_row,
    load_tile,
    operand,
    pair_factors,
    product,
    route,
    store_row,
    store_tile,
    tile_logits,
    tile_scale,
)


@triton.jit
def write_operands(
    V, W, LA, first, columns, stride_v, stride_w, stride_a, count, DV,
    T: tl.constexpr, EVEN_V: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """
    Values of a chunk, with zeros at padding; the largest value, the largest weight, the weights, running sums of decays and
    resets, the decays to the end of the chunk, and the part of the state before the chunk that is left after it.
    """
    value = load_tile(V, first, columns, stride_v, count, DV, T, EVEN_V).to(tl.float32)
    weight = (tl.arange(0, T) < count).to(tl.float32)
    if HAS_WEIGHT:
        weight = load_row(W, first, stride_w, count, 0.0, T)
        value = tl.where((weight > 0)[:, None], value, 0.0)  # padding may hold anything
    sums = weight
    resets = weight
    to_end = weight
    keep = 1.0
    log_decay = 0.0
    num_resets = 0.0
    if HAS_DECAY:
        sums, resets, log_decay, num_resets = load_decays(LA, first, stride_a, count, T)
        to_end = tl.where(resets == num_resets, tl.exp2(log_decay - sums), 0.0) * weight
        keep = tl.where(num_resets == 0.0, tl.exp2(log_decay), 0.0)
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    heaviest = 1.0
    if HAS_WEIGHT:
        heaviest = tl.max(weight, 0)
    return value, largest, heaviest, weight, sums, resets, to_end, keep, log_decay, num_resets


@triton.jit(do_not_specialize=["N", "M", "segments", "chunks_per_segment", "kv_groups"])
def write_kernel(
    K, V, W, LA, Coefficients, Bias, States, SegmentDecays, LargestV,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_wb, stride_wh, stride_wn,
    stride_ab, stride_ah, stride_an, N, C, D, DV, M, segments, chunks_per_segment, kv_groups,
    T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_Z: tl.constexpr,
    CORRELATE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The writes of one segment, in the layout of `states_kernel`."""
    program = tl.program_id(0)
    segment = program % segments
    bm = program // segments
    batch, mixture, slab = (bm // M).to(tl.int64), bm % M, bm.to(tl.int64)
    parts: tl.constexpr = 2 if EXACT else 4
    Coefficients += mixture.to(tl.int64) * parts * CP * DP
    bias = tl.load(Bias + mixture * CP + tl.arange(0, CP))
    linear, quadratic, linear_rest, quadratic_rest = load_coefficients(Coefficients, 0, CP, DP, BD, EXACT)
    K += batch * stride_kb + (mixture // kv_groups).to(tl.int64) * stride_kh
    V += batch * stride_vb + (mixture // kv_groups).to(tl.int64) * stride_vh
    if HAS_WEIGHT:
        W += batch * stride_wb + mixture.to(tl.int64) * stride_wh
    if HAS_DECAY:
        LA += batch * stride_ab + mixture.to(tl.int64) * stride_ah
    S = tl.zeros([CP, BV], tl.float32)
    z = tl.zeros([CP], tl.float32)
    log_decay = 0.0
    num_resets = 0.0
    for i in tl.range(chunks_per_segment, disable_licm=True):
        first = (segment * chunks_per_segment + i) * T
        count = N - first
        value, largest, heaviest, _, _, _, to_end, keep, total, total_resets = write_operands(
            V, W, LA, first, tl.arange(0, BV), stride_vn, stride_wn, stride_an, count, DV,
            T, EVEN_V, HAS_WEIGHT, HAS_DECAY,
        )  # fmt: skip
        if first < N:
            tl.store(LargestV + slab * tl.cdiv(N, T) + first // T, largest)
        logits = tile_logits(
            K, first, stride_kn, count, D, Coefficients, bias,
            linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
        )  # fmt: skip
        gamma = tl.trans(operand(route(logits, C, CP, CORRELATE), EXACT))
        if HAS_DECAY:
            S *= keep
            z *= keep
            log_decay += total
            num_resets += total_resets
        S, z = add_written(S, z, gamma, value, largest, heaviest, to_end, CP, HAS_Z, EXACT, PRECISION)
    States += (slab * segments + segment) * CP * (BV + 1)
    tl.store(States + tl.arange(0, CP)[:, None] * BV + tl.arange(0, BV)[None, :], S)
    tl.store(States + CP * BV + tl.arange(0, CP), z)
    if HAS_DECAY:
        whole = tl.where(num_resets == 0.0, tl.exp2(log_decay), 0.0)
        tl.store(SegmentDecays + slab * segments + segment, whole)


@triton.jit
def add_written(
    S, z, transposed, value, largest, heaviest, to_end,
    CP: tl.constexpr, HAS_Z: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S and z plus the writes of the chunk: sum_j t_j w_j gamma^K_j v_j^T, and the same with v_j = 1."""
    scale = tile_scale(largest * heaviest, EXACT)
    written = product(transposed, operand(value * (to_end * scale)[:, None], EXACT), PRECISION)
    S += written * (1.0 / (UNIT * scale))
    if HAS_Z:
        scale = tile_scale(heaviest, EXACT)
        zeros = tl.zeros([CP], tl.float32)
        z += add_column_sums(zeros, transposed, operand(to_end * scale, EXACT), PRECISION) * (1.0 / (UNIT * scale))
    return S, z


@triton.jit(do_not_specialize=["N", "M", "segments", "chunks_per_segment", "kv_groups", "sequences"])
def fused_read_kernel(
    Q, K, V, Output, Normalizer, RD, W, LA, Coefficients, Bias, States, Last,
    LargestV, ChunkStates, ChunkNorms, ChunkScales, Starts, Slots, Norms,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an,
    stride_state, stride_norm, N, C, D, DV, M, segments, chunks_per_segment, kv_groups, sequences, eps,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr,
    CAUSAL: tl.constexpr, ONE_PASS: tl.constexpr, LAST: tl.constexpr, HAS_STATE: tl.constexpr, STRICT: tl.constexpr, CORRELATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_Z: tl.constexpr, NORMALIZE: tl.constexpr,
    OUTPUT_NORMALIZER: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr, HAS_SLOTS: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment, for the R query heads of a mixture."""
    program = tl.program_id(0)
    segment = program % segments
    bm = program // segments
    batch, mixture, slab = (bm // M).to(tl.int64), bm % M, bm.to(tl.int64)
    row_length = N
    if PACKED:
        slot = batch
        if HAS_SLOTS:
            slot = tl.load(Slots + batch).to(tl.int64)
        place = batch + batch // sequences
        batch = batch // sequences
        start = tl.load(Starts + place)
        N = tl.load(Starts + place + 1) - start
        chunks_per_segment = tl.cdiv(N, T)
        start = start.to(tl.int64)
        Q += start * stride_qn
        K += start * stride_kn
        V += start * stride_vn
        Output += start * stride_on
        if HAS_WEIGHT:
            W += start * stride_wn
        if HAS_DECAY:
            LA += start * stride_an
        if OUTPUT_NORMALIZER:
            Normalizer += start
    chunks = tl.cdiv(N, T)
    parts: tl.constexpr = 2 if EXACT else 4
    Coefficients += mixture.to(tl.int64) * parts * CP * DP
    bias = tl.load(Bias + mixture * CP + tl.arange(0, CP))
    linear, quadratic, linear_rest, quadratic_rest = load_coefficients(Coefficients, 0, CP, DP, BD, EXACT)
    columns = tl.arange(0, BV)
    if HAS_WEIGHT:
        W += batch * stride_wb + mixture.to(tl.int64) * stride_wh
    if HAS_DECAY:
        LA += batch * stride_ab + mixture.to(tl.int64) * stride_ah
    K += batch * stride_kb + (mixture // kv_groups).to(tl.int64) * stride_kh
    V += batch * stride_vb + (mixture // kv_groups).to(tl.int64) * stride_vh
    if SAVE and ONE_PASS:
        LargestV += slab * chunks

    of_state = tl.arange(0, CP)[:, None] * BV + tl.arange(0, BV)[None, :]
    of_norm = tl.arange(0, CP)
    if PACKED:
        States += slot * stride_state + mixture.to(tl.int64) * C * DV
        Norms += slot * stride_norm + mixture.to(tl.int64) * C
        of_packed_state = tl.arange(0, CP)[:, None] * DV + columns[None, :]
        has_component = of_norm < C
        in_state = has_component[:, None] & (columns < DV)[None, :]
        S = tl.load(States + of_packed_state, mask=in_state, other=0.0)
        z = tl.load(Norms + of_norm, mask=has_component, other=0.0)
        largest_state = tl.max(tl.max(tl.abs(S), 1), 0)
    elif HAS_STATE:
        States += slab * stride_state + (segment.to(tl.int64) * CP * (BV + 1) if CAUSAL else 0)
        S = tl.load(States + of_state)
        z = tl.load(States + CP * BV + of_norm)
        largest_state = tl.max(tl.max(tl.abs(S), 1), 0)
    else:
        S = tl.zeros([CP, BV], tl.float32)
        z = tl.zeros([CP], tl.float32)
        largest_state = 0.0
    for i in tl.range(chunks_per_segment, disable_licm=True):
        chunk = segment * chunks_per_segment + i
        first = chunk * T
        count = N - first
        # The state before the chunk
        S_scale = tile_scale(largest_state, EXACT)
        S_operand = operand(S * S_scale, EXACT)
        z_before = z
        if SAVE and CAUSAL:
            state = slab * chunks + chunk
            to, norm_to = here(of_state, chunk), here(of_norm, chunk)
            tl.store(ChunkStates + state * CP * BV + to, S_operand, mask=to * 0 + chunk < chunks)
            if HAS_Z:
                tl.store(ChunkNorms + state * CP + norm_to, z, mask=norm_to * 0 + chunk < chunks)
            if chunk < chunks:
                tl.store(ChunkScales + state, S_scale)
        if CAUSAL:
            # What the chunk writes, and the state after it
            logits = tile_logits(
                K, first, stride_kn, count, D, Coefficients, bias,
                linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
            )  # fmt: skip
            gamma_key = operand(route(logits, C, CP, CORRELATE), EXACT)
            value, largest, heaviest, weight, sums, resets, to_end, keep, _, _ = write_operands(
                V, W, LA, first, columns, stride_vn, stride_wn, stride_an, count, DV, T, EVEN_V, HAS_WEIGHT, HAS_DECAY
            )
            if SAVE and ONE_PASS:
                tl.store(LargestV + chunk, largest)
            if HAS_DECAY:
                from_start = tl.where(resets == 0.0, tl.exp2(sums), 0.0)
            value_scale = tile_scale(largest * heaviest, EXACT)
            value_operand = operand(value * (weight * value_scale)[:, None], EXACT)
            if HAS_DECAY:
                S *= keep
                z *= keep
                largest_state *= keep
            if HAS_DECAY:
                S, z = add_written(
                    S, z, tl.trans(gamma_key), value, largest, heaviest, to_end, CP, HAS_Z, EXACT, PRECISION
                )
            else:
                S += product(tl.trans(gamma_key), value_operand, PRECISION) * (1.0 / (UNIT * value_scale))
                if HAS_Z:
                    z_scale = tile_scale(heaviest, EXACT)
                    added = add_column_sums(
                        tl.zeros([CP], tl.float32), tl.trans(gamma_key), operand(weight * z_scale, EXACT), PRECISION
                    )
                    z += added * (1.0 / (UNIT * z_scale))
            largest_state += T * heaviest * largest
            factors = pair_factors(sums, resets, first, T, STRICT, HAS_DECAY)

        for r in range(R):
            head = mixture * R + r
            logits = tile_logits(
                Q + batch * stride_qb + head.to(tl.int64) * stride_qh, first, stride_qn, count, D, Coefficients, bias,
                linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
            )  # fmt: skip
            gamma_query = route(logits, C, CP, CORRELATE)
            token = (batch * M * R + head).to(tl.int64) * row_length
            if NORMALIZE:
                denominator = tl.sum(gamma_query * z_before[None, :], 1) * (1.0 / UNIT)
                if HAS_DECAY:
                    denominator *= from_start
            query = operand(gamma_query, EXACT)
            read = product(query, S_operand, PRECISION)
            read_scale = UNIT
            if CAUSAL:
                read_scale *= value_scale
            if HAS_DECAY:
                read *= (from_start * (read_scale / (UNIT * S_scale)))[:, None]
            else:
                read *= read_scale / (UNIT * S_scale)
            if CAUSAL:
                pairs = decayed(product(query, tl.trans(gamma_key), PRECISION), 1.0, factors, HAS_DECAY)  # times UNIT
                read = product(operand(pairs, EXACT), value_operand, PRECISION, read)
                if NORMALIZE:
                    if HAS_WEIGHT:
                        pairs *= weight[None, :]
                    denominator += tl.sum(pairs, 1) * (1.0 / UNIT)
            if NORMALIZE:
                reciprocal = 1.0 / (denominator + eps)
                if OUTPUT_NORMALIZER:
                    store_row(Normalizer + token, denominator + eps, first, count, T)
                if SAVE:
                    store_row(RD + token, reciprocal, first, count, T)
                read *= (reciprocal * (1.0 / read_scale))[:, None]
            else:
                read *= 1.0 / read_scale
            store_tile(
                Output + batch * stride_ob + head.to(tl.int64) * stride_oh, read,
                first, columns, stride_on, count, DV, T, EVEN_V,
            )  # fmt: skip
    if PACKED:
        tl.store(States + of_packed_state, S, mask=in_state)
        if HAS_Z:
            tl.store(Norms + of_norm, z, mask=has_component)
    elif LAST:
        Last += slab * CP * (BV + 1)
        tl.store(Last + of_state, S)
        tl.store(Last + CP * BV + of_norm, z)
