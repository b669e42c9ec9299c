# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The middle of the backward pass: gradients of everything before the outputs, up to the logits. Chunks are independent.

i, j are in one chunk, S, z is the state before it (kept by the forward pass), G, g the gradient of the state after it
(`states` backwards), dn_i = do_i / D_i, and e, t, A the decays of `states`:

    dD_i  = -(sum_j P_ij dn_i . v_j + e_i gamma^Q_i . S dn_i) / D_i                     0 if the read is not normalised;
                                                                                        plus the gradient of D_i as an output
    dP_ij = dn_i . v_j + dD_i
    dgamma^Q_i = sum_j decayed dP_ij w_j gamma^K_j + e_i (S dn_i + dD_i z)
    d(w gamma^K)_j = sum_i decayed dP_ij gamma^Q_i + t_j (G v_j + g)
    dv_j  = sum_i P_ij dn_i + t_j w_j G^T gamma^K_j

Then dlogits = gamma (dgamma - gamma . dgamma), from which `responsibilities` computes the gradients of queries, keys and the
mixture. For the decays, with r_i = gamma^Q_i . dgamma^Q_i and s_j = w_j gamma^K_j . d(w gamma^K)_j, summed over everything
that spans l:

    dlog a_l = sum_{i >= l} (r_i - s_i) + A (S . G + z . g) + sum_j t_j w_j gamma^K_j . (G v_j + g)

With correlation, rho replaces gamma everywhere except in the logits. l_i = |gamma_i - 1/C| is the divisor of rho_i:

    dgamma = (drho - rho (rho . drho)) / l,        gamma = l rho + 1/C
"""

import triton
import triton.language as tl

from .tiles import (
    RESET,
    UNIT,
    decayed,
    load_norm,
    load_row,
    load_state,
    load_tile,
    load_value,
    operand,
    pair_factors,
    product,
    store_row,
    store_tile,
    tile_scale,
)


@triton.jit
def logit_gradient(grad_gamma, gamma):
    """gamma (dgamma - gamma . dgamma), and gamma . dgamma."""
    # Rounded responsibilities do not add up to 1; the gradient vanishes where all of dgamma are equal all the same
    total = tl.sum(grad_gamma * gamma, 1) / tl.maximum(tl.sum(gamma, 1), 0.5)
    return (grad_gamma - total[:, None]) * gamma, total


@triton.jit
def route_gradient(
    grad, route, Lengths, first, count, C, T: tl.constexpr, CP: tl.constexpr, CORRELATE: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """The gradient of the logits from the gradient of gamma (or rho) [T, CP], and their product [T]."""
    if CORRELATE:
        total = tl.sum(grad * route, 1)
        length = load_row(Lengths, first, 1, count, 1.0, T)[:, None]
        gamma = length * route + 1.0 / C
        # What rounding of rho leaves of responsibilities of 0 is none, or tokens far outside would have gradients
        is_there = gamma * C > (0.0000005 if EXACT else 0.0005)
        gamma = tl.where(is_there & (tl.arange(0, CP) < C)[None, :], gamma, 0.0)
        grad, _ = logit_gradient((grad - route * total[:, None]) / length, gamma)
    else:
        grad, total = logit_gradient(grad, route)
    return grad, total


@triton.jit
def load_gradient(
    DO, Largest, RD, token, of_chunk, first, columns, stride, count, DV,
    T: tl.constexpr, EVEN_V: tl.constexpr, NORMALIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dn of a chunk times its scale as an operand, and the scale."""
    dn = load_tile(DO, first, columns, stride, count, DV, T, EVEN_V).to(tl.float32)
    scale = tile_scale(tl.load(Largest + of_chunk), EXACT)
    if NORMALIZE:
        dn *= (load_row(RD + token, first, 1, count, 0.0, T) * scale)[:, None]
    else:
        dn *= scale
    return operand(dn, EXACT), scale


@triton.jit
def from_state_after(
    grad_key, gamma_key, g, weight, to_end, HAS_Z: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr
):  # fmt: skip
    """t_j w_j (G v_j + g) [T, CP] from G v_j, and its product with gamma^K_j without the weight [T]."""
    total = to_end
    if HAS_Z:
        grad_key += g[None, :]
    if HAS_DECAY:
        grad_key *= to_end[:, None]
    if HAS_DECAY or HAS_WEIGHT:
        total = tl.sum(grad_key * gamma_key.to(tl.float32), 1) * (1.0 / UNIT)
    if HAS_WEIGHT:
        grad_key *= weight[:, None]
    return grad_key, total


@triton.jit(do_not_specialize=["N", "M", "kv_groups"])
def gradient_kernel(
    GammaQ, GammaK, V, DO, RD, GradNormalizer, W, LA, DecaySums, LengthsQ, LengthsK,
    ChunkStates, ChunkNorms, ChunkScales, GradStates, GradNorms, GradScales, LargestV, LargestDN,
    GradLogitsQ, GradLogitsK, GV, GW, GLA,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gvb, stride_gvh, stride_gvn,
    stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an,
    N, C, DV, M, kv_groups,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, EVEN_V: tl.constexpr,
    CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STRICT: tl.constexpr, CORRELATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_Z: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_GRAD_NORMALIZER: tl.constexpr, GRAD_WEIGHT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    Gradients of one chunk. In bidirectional calls, whose lengths may differ, either of QUERIES or of KEYS and values. The
    gradients of the logits may overwrite the responsibilities, because only this program reads them. With several query
    heads per mixture (R), the value dimensions are one block.
    """
    program = tl.program_id(0)
    chunks = tl.cdiv(N, T)
    chunk = program % chunks
    bm = program // chunks
    batch, mixture, slab = (bm // M).to(tl.int64), bm % M, bm.to(tl.int64)
    first = chunk * T
    count = N - first
    components, tokens = tl.arange(0, CP), tl.arange(0, T)
    if HAS_DECAY:
        DecaySums += 2 * slab * N
        last = tl.minimum(first + T, N) - 1
        sums, resets = load_row(DecaySums, first, 1, count, 0.0, T), load_row(DecaySums + N, first, 1, count, 0.0, T)
        total, total_resets = tl.load(DecaySums + last), tl.load(DecaySums + N + last)
        from_start = tl.where(resets == 0.0, tl.exp2(sums), 0.0)
        to_end = tl.where(resets == total_resets, tl.exp2(total - sums), 0.0)
        keep = tl.where(total_resets == 0.0, tl.exp2(total), 0.0)
        read_minus_write = tl.zeros([T], tl.float32)
        carried = 0.0
    weight = (tokens < count).to(tl.float32)
    if HAS_WEIGHT and (CAUSAL or KEYS):
        weight = load_row(W + batch * stride_wb + mixture.to(tl.int64) * stride_wh, first, stride_wn, count, 0.0, T)
        heaviest = tl.max(weight, 0)
        # The gradient of w is that of w gamma divided by w, unless w is too small for it
        has_tiny = tl.min(weight, 0) <= heaviest * 0.000244140625
    if CAUSAL or KEYS:
        key_tile = GammaK + batch * stride_kb + mixture.to(tl.int64) * stride_kh
        gamma_key = load_tile(key_tile, first, components, stride_kn, count, CP, T, True)
        value_pointer = V + batch * stride_vb + (mixture // kv_groups).to(tl.int64) * stride_vh
    if not HAS_DECAY:
        sums = weight
        resets = weight
        to_end = weight
    if CAUSAL:
        factors = pair_factors(sums, resets, first, T, STRICT, HAS_DECAY)
    if HAS_Z:
        if QUERIES:
            z = load_norm(ChunkStates, ChunkNorms, slab, chunk, chunks, CP, NV * BV, CAUSAL)
        if KEYS:
            g = load_norm(GradStates, GradNorms, slab, chunk, chunks, CP, NV * BV, CAUSAL)
            if HAS_DECAY:
                carried += tl.sum(z * g, 0)
        else:
            g = z
    else:
        g = tl.zeros([CP], tl.float32)
    if KEYS:
        grad_value_pointer = GV + batch * stride_gvb + mixture.to(tl.int64) * stride_gvh
        grad_key = tl.zeros([T, CP], tl.float32)  # of w gamma
        from_state = tl.zeros([T], tl.float32)
        grad_weight = tl.zeros([T], tl.float32)

    if KEYS and (R > 1 or not CAUSAL):  # before all query heads
        for v in tl.static_range(NV):
            columns = v * BV + tl.arange(0, BV)
            value_scale = tile_scale(tl.load(LargestV + (slab * NV + v) * chunks + chunk), EXACT)
            value = load_value(
                value_pointer, first, columns, stride_vn, count, DV, value_scale, T, EVEN_V, HAS_WEIGHT, EXACT
            )
            grad_state, grad_scale = load_state(
                GradStates, GradScales, slab, chunk, chunks, v, CP, BV, NV, CAUSAL, EXACT
            )
            grad_key += product(value, tl.trans(grad_state), PRECISION) * (1.0 / (value_scale * grad_scale))
            grad_value = product(gamma_key, grad_state, PRECISION) * (1.0 / (UNIT * grad_scale))
            if HAS_DECAY:
                grad_value *= to_end[:, None]
            if not CAUSAL:
                if HAS_WEIGHT:
                    grad_value *= weight[:, None]
                store_tile(grad_value_pointer, grad_value, first, columns, stride_gvn, count, DV, T, EVEN_V)
        grad_key, from_state = from_state_after(grad_key, gamma_key, g, weight, to_end, HAS_Z, HAS_WEIGHT, HAS_DECAY)

    if CAUSAL or QUERIES:
        for r in range(R):
            head = mixture * R + r
            token = (batch * M * R + head) * N
            query_tile = GammaQ + batch * stride_qb + head.to(tl.int64) * stride_qh
            gamma_query = load_tile(query_tile, first, components, stride_qn, count, CP, T, True)
            if NORMALIZE:
                rd = load_row(RD + token, first, 1, count, 0.0, T)
            grad_query = tl.zeros([T, CP], tl.float32)

            # The pairs of the chunk
            if CAUSAL:
                pairs = product(gamma_query, tl.trans(gamma_key), PRECISION)
                pairs = decayed(pairs, 1.0, factors, HAS_DECAY)  # times UNIT
                pairs_operand = operand(pairs, EXACT)
                grad_pairs = tl.zeros([T, T], tl.float32)
                pair_unit = 1.0
            for v in tl.static_range(NV):
                columns = v * BV + tl.arange(0, BV)
                dn, dn_scale = load_gradient(
                    DO + batch * stride_ob + head.to(tl.int64) * stride_oh, LargestDN, RD, token,
                    ((batch * M * R + head) * NV + v) * chunks + chunk,
                    first, columns, stride_on, count, DV, T, EVEN_V, NORMALIZE, EXACT,
                )  # fmt: skip
                if CAUSAL:
                    if R == 1:
                        value_scale = tile_scale(tl.load(LargestV + (slab * NV + v) * chunks + chunk), EXACT)
                        value = load_value(
                            value_pointer, first, columns, stride_vn, count, DV, value_scale,
                            T, EVEN_V, HAS_WEIGHT, EXACT,
                        )  # fmt: skip
                    if NV == 1:
                        grad_pairs = product(dn, tl.trans(value), PRECISION)
                        pair_unit = dn_scale * value_scale
                    else:
                        grad_pairs += product(dn, tl.trans(value), PRECISION) * (1.0 / (dn_scale * value_scale))
                if NORMALIZE or not CAUSAL:
                    state, state_scale = load_state(
                        ChunkStates, ChunkScales, slab, chunk, chunks, v, CP, BV, NV, CAUSAL, EXACT
                    )
                    grad_query += product(dn, tl.trans(state), PRECISION) * (1.0 / (dn_scale * state_scale))
            if NORMALIZE:
                if HAS_DECAY:
                    grad_query *= from_start[:, None]
                grad_denominator = tl.sum(gamma_query.to(tl.float32) * grad_query, 1) * (1.0 / UNIT)
                if CAUSAL:
                    both = pairs * grad_pairs
                    if HAS_WEIGHT:
                        both *= weight[None, :]
                    grad_denominator += tl.sum(both, 1) * (1.0 / (UNIT * pair_unit))
                grad_denominator *= -rd
                if HAS_GRAD_NORMALIZER:
                    grad_denominator += load_row(GradNormalizer + token, first, 1, count, 0.0, T)
                z_grad = grad_denominator
                if HAS_DECAY:
                    z_grad *= from_start
                grad_query += z_grad[:, None] * z[None, :]
                if CAUSAL:
                    grad_pairs += (grad_denominator * pair_unit)[:, None]
            if CAUSAL:
                if GRAD_WEIGHT:
                    if has_tiny:
                        both = grad_pairs * pairs_operand.to(tl.float32)
                        grad_weight += tl.sum(both, 0) * (1.0 / (UNIT * pair_unit))
                grad_pairs = decayed(grad_pairs, UNIT / pair_unit, factors, HAS_DECAY)
                if HAS_WEIGHT:
                    grad_pairs *= weight[None, :]
                # Of these themselves: a first token after nothing divides by eps, and a bound would leave others no bits
                scale = tile_scale(tl.max(tl.max(tl.abs(grad_pairs), 1), 0), EXACT)
                grad_pairs_operand = operand(grad_pairs * scale, EXACT)
                unscaled_pairs = 1.0 / (UNIT * scale)

            # Values and keys
            if KEYS:
                for v in tl.static_range(NV):
                    columns = v * BV + tl.arange(0, BV)
                    if NV > 1:
                        dn, dn_scale = load_gradient(
                            DO + batch * stride_ob + head.to(tl.int64) * stride_oh, LargestDN, RD, token,
                            ((batch * M * R + head) * NV + v) * chunks + chunk,
                            first, columns, stride_on, count, DV, T, EVEN_V, NORMALIZE, EXACT,
                        )  # fmt: skip
                        value_scale = tile_scale(tl.load(LargestV + (slab * NV + v) * chunks + chunk), EXACT)
                        value = load_value(
                            value_pointer, first, columns, stride_vn, count, DV, value_scale,
                            T, EVEN_V, HAS_WEIGHT, EXACT,
                        )  # fmt: skip
                    if R == 1:
                        grad_state, grad_scale = load_state(
                            GradStates, GradScales, slab, chunk, chunks, v, CP, BV, NV, CAUSAL, EXACT
                        )
                        grad_value = product(gamma_key, grad_state, PRECISION) * (1.0 / (UNIT * grad_scale))
                        if HAS_DECAY:
                            grad_value *= to_end[:, None]
                    grad_value += product(tl.trans(pairs_operand), dn, PRECISION) * (1.0 / (UNIT * dn_scale))
                    if R == 1:
                        if HAS_WEIGHT:
                            grad_value *= weight[:, None]
                        store_tile(grad_value_pointer, grad_value, first, columns, stride_gvn, count, DV, T, EVEN_V)
                        grad_key += product(value, tl.trans(grad_state), PRECISION) * (
                            1.0 / (value_scale * grad_scale)
                        )
                    if HAS_DECAY:
                        if r == 0:
                            state, state_scale = load_state(
                                ChunkStates, ChunkScales, slab, chunk, chunks, v, CP, BV, NV, CAUSAL, EXACT
                            )
                            both = state.to(tl.float32) * grad_state.to(tl.float32)
                            carried += tl.sum(tl.sum(both, 1), 0) * (1.0 / (state_scale * grad_scale))
                if R == 1:
                    grad_key, from_state = from_state_after(
                        grad_key, gamma_key, g, weight, to_end, HAS_Z, HAS_WEIGHT, HAS_DECAY
                    )
                grad_key += product(tl.trans(grad_pairs_operand), gamma_query, PRECISION) * unscaled_pairs

            # Queries
            if QUERIES:
                if CAUSAL and not NORMALIZE:
                    for v in tl.static_range(NV):
                        if NV > 1:
                            dn, dn_scale = load_gradient(
                                DO + batch * stride_ob + head.to(tl.int64) * stride_oh, LargestDN, RD, token,
                                ((batch * M * R + head) * NV + v) * chunks + chunk, first, v * BV + tl.arange(0, BV),
                                stride_on, count, DV, T, EVEN_V, NORMALIZE, EXACT,
                            )  # fmt: skip
                        state, state_scale = load_state(
                            ChunkStates, ChunkScales, slab, chunk, chunks, v, CP, BV, NV, CAUSAL, EXACT
                        )
                        grad_query += product(dn, tl.trans(state), PRECISION) * (1.0 / (dn_scale * state_scale))
                    if HAS_DECAY:
                        grad_query *= from_start[:, None]
                if CAUSAL:
                    grad_query += product(grad_pairs_operand, gamma_key, PRECISION) * unscaled_pairs
                grad_query, total_read = route_gradient(
                    grad_query, gamma_query.to(tl.float32) * (1.0 / UNIT), LengthsQ + token if CORRELATE else LengthsQ,
                    first, count, C, T, CP, CORRELATE, EXACT,
                )  # fmt: skip
                if HAS_DECAY:
                    read_minus_write += total_read
                store_tile(
                    GradLogitsQ + batch * stride_qb + head.to(tl.int64) * stride_qh, grad_query,
                    first, components, stride_qn, count, CP, T, True,
                )  # fmt: skip

    if KEYS:
        if R > 1 and CAUSAL:
            if HAS_WEIGHT:
                grad_value *= weight[:, None]
            store_tile(grad_value_pointer, grad_value, first, tl.arange(0, BV), stride_gvn, count, DV, T, EVEN_V)
        grad_key, total_write = route_gradient(
            grad_key, gamma_key.to(tl.float32) * (1.0 / UNIT), LengthsK + slab * N if CORRELATE else LengthsK,
            first, count, C, T, CP, CORRELATE, EXACT,
        )  # fmt: skip
        if GRAD_WEIGHT:
            if CAUSAL:
                grad_weight = tl.where(has_tiny, grad_weight + from_state, total_write / tl.maximum(weight, 1e-30))
            else:
                grad_weight = from_state
            store_row(GW + slab * N, grad_weight, first, count, T)
        if HAS_DECAY:
            # Backwards running sum, as what all but the tokens before add up to
            read_minus_write -= total_write
            spanning = tl.sum(from_state * weight, 0) + carried * keep + tl.cumsum(read_minus_write, 0, reverse=True)
            log_decay = load_row(
                LA + batch * stride_ab + mixture.to(tl.int64) * stride_ah, first, stride_an, count, 0.0, T
            )
            store_row(GLA + slab * N, tl.where(log_decay < RESET, 0.0, spanning), first, count, T)
        store_tile(
            GradLogitsK + batch * stride_kb + mixture.to(tl.int64) * stride_kh, grad_key,
            first, components, stride_kn, count, CP, T, True,
        )  # fmt: skip
