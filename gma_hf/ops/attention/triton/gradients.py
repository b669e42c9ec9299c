# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Gradients of everything, chunk by chunk from the right: the backward pass, second half.

i, j in one chunk, S, z the state before it (saved by the forward pass), G, g the gradient of the state after it (carried),
dn_i = do_i / D_i, and e, t, A the decays of `outputs`:

    dD_i  = -(sum_j P_ij dn_i . v_j + e_i gamma^Q_i . S dn_i) / D_i                     0 if the read is not normalised;
                                                                            plus that of D_i as an output
    dP_ij = dn_i . v_j + dD_i
    dgamma^Q_i = sum_j decayed dP_ij w_j gamma^K_j + e_i (S dn_i + dD_i z)
    d(w gamma^K)_j = sum_i decayed dP_ij gamma^Q_i + t_j (G v_j + g)
    dv_j  = sum_i P_ij dn_i + t_j w_j G^T gamma^K_j
    G    <- A G + sum_i e_i gamma^Q_i dn_i^T,           g <- A g + sum_i e_i gamma^Q_i dD_i

Behind the responsibilities (the paper's responsibility-modulated gradient):

    dlogit = gamma (dgamma - gamma . dgamma),    dx = dlogit @ linear + 2 x (dlogit @ quadratic)
    dlinear = sum dlogit^T x,    dquadratic = sum dlogit^T x^2,    dbias = sum dlogit           over queries and keys

and of the decays, with r_i = gamma^Q_i . dgamma^Q_i and s_j = w_j gamma^K_j . d(w gamma^K)_j, summed over what spans l:

    dlog a_l = sum_{i >= l} (r_i - s_i) + A (S . G + z . g) + sum_j t_j w_j gamma^K_j . (G v_j + g)

A program walks over segments of one mixture and sums its parameters' gradients in registers (or, where they do not fit,
in its own slice of memory): no atomics, so the same call gives the same bits. All of it is linear in dn, so blocks of BV
value dimensions are separate programs whose gradients add up.
"""

import triton
import triton.language as tl

from .tiles import (
    LN2,
    RESET,
    UNIT,
    add_column_sums,
    compute_tile,
    decayed,
    here,
    load_coefficients,
    load_decays,
    load_row,
    load_tile,
    ones,
    operand,
    pair_decays,
    product,
    responsibilities_again,
    rounded,
    square,
    square_rest,
    store_row,
    store_tile,
    tile_logits,
    tile_scale,
    visible_pairs,
)


@triton.jit
def logit_gradient(grad_gamma, gamma, EXACT: tl.constexpr):
    """gamma (dgamma - gamma . dgamma), rounded as the products behind it want it, and gamma . dgamma."""
    gamma = gamma.to(tl.float32) * (1.0 / UNIT)
    # Rounded responsibilities do not add up to 1; the gradient vanishes where all of dgamma are equal all the same
    total = tl.sum(grad_gamma * gamma, 1) / tl.maximum(tl.sum(gamma, 1), 0.5)
    grad = (grad_gamma - total[:, None]) * gamma
    if not EXACT:
        grad = rounded(grad, tl.bfloat16)
    return grad, total


@triton.jit
def logits_backward(
    grad_linear, grad_quadratic, grad_bias, GX, X, first, grad, stride_g, stride, count, D,
    GradLinear, GradQuadratic, coefficients, linear, quadratic, linear_rest, quadratic_rest,
    T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, EVEN_D: tl.constexpr,
    IN_REGISTERS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dx of a tile; add dlogit^T x, dlogit^T x^2 and the sum of dlogit to the program's sums."""
    transposed = tl.trans(grad)
    grad_bias = add_column_sums(grad_bias, transposed, ones(T, grad.dtype), PRECISION)
    for block in tl.static_range(0, DP // BD):
        columns = block * BD + tl.arange(0, BD)
        if block > 0:
            linear, quadratic, linear_rest, quadratic_rest = load_coefficients(coefficients, block, CP, DP, BD, EXACT)
        x = compute_tile(load_tile(X, first, columns, stride, count, D, T, EVEN_D, "evict_first"), EXACT)
        by_square = product(grad, quadratic, PRECISION)
        if not EXACT:
            by_square = product(grad, quadratic_rest, PRECISION, by_square)
        by_x = 2.0 * x.to(tl.float32) * by_square
        if not EXACT:
            by_x = product(grad, linear_rest, PRECISION, by_x)
        by_x = product(grad, linear, PRECISION, by_x)
        # The coefficients are in base 2
        store_tile(GX, by_x * LN2, first, columns, stride_g, count, D, T, EVEN_D)

        if not IN_REGISTERS:
            offsets = here(tl.arange(0, CP)[:, None] * DP + columns[None, :], first)
            grad_linear = tl.load(GradLinear + offsets)
            grad_quadratic = tl.load(GradQuadratic + offsets)
        grad_linear = product(transposed, x, PRECISION, grad_linear)
        grad_quadratic = product(transposed, square(x, EXACT), PRECISION, grad_quadratic)
        if not EXACT:
            grad_quadratic = product(transposed, square_rest(x), PRECISION, grad_quadratic)
        if not IN_REGISTERS:
            tl.store(GradLinear + offsets, grad_linear)
            tl.store(GradQuadratic + offsets, grad_quadratic)
    return grad_linear, grad_quadratic, grad_bias


@triton.jit(do_not_specialize=["B", "N", "M", "segments", "chunks_per_segment", "chunks", "kv_groups", "programs"])
def gradient_kernel(
    Q, K, V, DO, RD, GradNormalizer, W, LA, Coefficients, Bias, LSEQ, LSEK, LargestV, LargestW, LargestDN, DD, Reads,
    States, ChunkStates, ChunkNorms, ChunkScales, GradStates,
    GradFirst, GQ, GK, GV, GW, GLA, GradLinear, GradQuadratic, GradBias,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an,
    stride_gqv, stride_gqb, stride_gqh, stride_gqn, stride_gkv, stride_gkb, stride_gkh, stride_gkn,
    stride_gvb, stride_gvh, stride_gvn, stride_state, stride_grad_state,
    B, N, D, DV, M, segments, chunks_per_segment, chunks, kv_groups, programs,
    R: tl.constexpr, T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr,
    CAUSAL: tl.constexpr, QUERIES: tl.constexpr, HAS_GRAD_STATE: tl.constexpr, GRAD_FIRST: tl.constexpr,
    STRICT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_GRAD_NORMALIZER: tl.constexpr, GRAD_WEIGHT: tl.constexpr, IN_REGISTERS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of QUERIES, else of keys and values, which takes from memory what the former left there: the denominators'
    gradients dD, the largest dn of each chunk, and the sums r that the gradients of the decays need. One kernel for both needs more registers than
    there are, and was slower than computing the responsibilities twice."""
    KEYS: tl.constexpr = not QUERIES
    program = tl.program_id(0)
    v = program % NV
    mixture = (program // NV) % M
    worker = (program // NV) // M
    parts: tl.constexpr = 2 if EXACT else 4
    Coefficients += mixture.to(tl.int64) * parts * CP * DP
    bias = tl.load(Bias + mixture * CP + tl.arange(0, CP))
    linear, quadratic, linear_rest, quadratic_rest = load_coefficients(Coefficients, 0, CP, DP, BD, EXACT)
    columns = v * BV + tl.arange(0, BV)
    kv_head = (mixture // kv_groups).to(tl.int64)
    of_state = tl.arange(0, CP)[:, None] * BV + tl.arange(0, BV)[None, :]
    of_norm = tl.arange(0, CP)
    # Partial sums [workers * NV, M, CP, DP]
    partial = ((worker * NV + v) * M + mixture).to(tl.int64)
    GradLinear += partial * CP * DP
    GradQuadratic += partial * CP * DP
    grad_linear = tl.zeros([CP, BD], tl.float32)
    grad_quadratic = tl.zeros([CP, BD], tl.float32)
    grad_bias = tl.zeros([CP], tl.float32)

    for item in tl.range(worker, B * segments, programs, disable_licm=True):
        batch, segment = (item // segments).to(tl.int64), item % segments
        bm = batch * M + mixture
        slab = bm * NV + v
        if KEYS:
            if HAS_GRAD_STATE:
                from_right = GradStates + slab * stride_grad_state
                if CAUSAL:
                    from_right += segment.to(tl.int64) * CP * (BV + 1)
                G = tl.load(from_right + here(of_state, item))
                g = tl.load(from_right + CP * BV + here(of_norm, item))
                largest = tl.max(tl.max(tl.abs(G), 1), 0)
            else:
                G = tl.zeros([CP, BV], tl.float32)
                g = tl.zeros([CP], tl.float32)
                largest = 0.0
        if not CAUSAL and QUERIES:
            S = tl.load(States + slab * stride_state + here(of_state, item))
            z = tl.load(States + slab * stride_state + CP * BV + here(of_norm, item))
            S_scale = tile_scale(tl.max(tl.max(tl.abs(S), 1), 0), EXACT)
            S = operand(S * S_scale, EXACT)

        for i in tl.range(chunks_per_segment, disable_licm=True):
            chunk = segment * chunks_per_segment + chunks_per_segment - 1 - i
            last = tl.minimum(chunk, chunks - 1)  # beyond the end no row counts
            first = chunk * T
            count = N - first
            decay_pointer = LA
            if HAS_DECAY:
                decay_pointer += batch * stride_ab + mixture.to(tl.int64) * stride_ah
                sums, resets, total, total_resets = load_decays(decay_pointer, first, stride_an, count, T)
                from_start = tl.where(resets == 0.0, tl.exp2(sums), 0.0)
                to_end = tl.where(resets == total_resets, tl.exp2(total - sums), 0.0)
                keep = tl.where(total_resets == 0.0, tl.exp2(total), 0.0)
                decays = pair_decays(sums, resets, first, T, STRICT)
                read_minus_write = tl.zeros([T], tl.float32)
            else:
                decays = visible_pairs(first, T, STRICT)

            if CAUSAL and (QUERIES or HAS_DECAY):
                state = slab * chunks + last
                S = tl.load(ChunkStates + state * CP * BV + here(of_state, chunk))
                z = tl.load(ChunkNorms + state * CP + here(of_norm, chunk))
                S_scale = tl.load(ChunkScales + state)

            if CAUSAL or KEYS:
                key_pointer = K + batch * stride_kb + kv_head * stride_kh
                logits = tile_logits(
                    key_pointer, first, stride_kn, count, D, Coefficients, bias,
                    linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
                )  # fmt: skip
                lse = load_row(LSEK + bm * N, first, 1, count, float("inf"), T)
                gamma = responsibilities_again(logits, lse)
                gamma_key = operand(gamma, EXACT)
                written = gamma_key
                weight_scale = 1.0
                if HAS_WEIGHT:
                    weights = W + batch * stride_wb + mixture.to(tl.int64) * stride_wh
                    weight = load_row(weights, first, stride_wn, count, 0.0, T)
                    weight_scale = tile_scale(tl.load(LargestW + bm * chunks + last), EXACT)
                    if not EXACT:
                        weight_scale *= 1.0 / UNIT
                    written = operand(gamma * (weight * weight_scale)[:, None], EXACT)
                written_scale = weight_scale * UNIT
                value_pointer = V + batch * stride_vb + kv_head * stride_vh
                value_scale = tile_scale(tl.load(LargestV + slab * chunks + last), EXACT)
                value = load_tile(value_pointer, first, columns, stride_vn, count, DV, T, EVEN_V).to(tl.float32)
                value *= value_scale
                if HAS_WEIGHT and not EXACT:  # padding may hold anything
                    value = tl.clamp(value, -32768.0, 32768.0)
                value = operand(value, EXACT)
            if KEYS:
                G_scale = tile_scale(largest, EXACT)
                G_operand = operand(G * G_scale, EXACT)
                g_after = g
                grad_written = tl.zeros([T, CP], tl.float32)
                grad_value = tl.zeros([T, BV], tl.float32)
                if HAS_DECAY:
                    carried = tl.sum(z * g, 0)
                    carried += tl.sum(tl.sum(S.to(tl.float32) * G, 1), 0) * (1.0 / S_scale)
                    G *= keep
                    g *= keep
                    largest *= keep

            if CAUSAL or QUERIES:
                for r in range(R):
                    head = mixture * R + r
                    query_pointer = Q + batch * stride_qb + head.to(tl.int64) * stride_qh
                    logits = tile_logits(
                        query_pointer, first, stride_qn, count, D, Coefficients, bias,
                        linear, quadratic, linear_rest, quadratic_rest, T, CP, DP, BD, EVEN_D, EXACT, PRECISION,
                    )  # fmt: skip
                    token = (batch * M * R + head) * N
                    lse = load_row(LSEQ + token, first, 1, count, float("inf"), T)
                    unfaded = responsibilities_again(logits, lse)
                    gamma_query = operand(unfaded, EXACT)
                    faded = gamma_query
                    if HAS_DECAY:
                        faded = operand(unfaded * from_start[:, None], EXACT)
                    grad_pointer = DO + batch * stride_ob + head.to(tl.int64) * stride_oh
                    dn = load_tile(grad_pointer, first, columns, stride_on, count, DV, T, EVEN_V).to(tl.float32)
                    if NORMALIZE:
                        rd = load_row(RD + token, first, 1, count, 0.0, T)
                        dn *= rd[:, None]
                    of_chunk = LargestDN + ((batch * M * R + head) * NV + v) * chunks + last
                    if QUERIES:
                        largest_dn = tl.max(tl.max(tl.abs(dn), 1), 0)
                        if chunk < chunks:
                            tl.store(of_chunk, largest_dn)
                    else:
                        largest_dn = tl.load(of_chunk)
                    dn_scale = tile_scale(largest_dn, EXACT)
                    dn_operand = operand(dn * dn_scale, EXACT)

                    # What is read from the chunk, and from the state before it
                    if CAUSAL:
                        pairs = decayed(product(gamma_query, tl.trans(written), PRECISION), decays, HAS_DECAY)
                        grad_pairs = product(dn_operand, tl.trans(value), PRECISION)
                        pair_scale = dn_scale * value_scale
                    if QUERIES:
                        grad_gamma = product(dn_operand, tl.trans(S), PRECISION) * (1.0 / (dn_scale * S_scale))
                        if HAS_DECAY:
                            grad_gamma *= from_start[:, None]
                    if NORMALIZE:
                        if QUERIES:
                            grad_denominator = tl.sum(gamma_query.to(tl.float32) * grad_gamma, 1) * (1.0 / UNIT)
                            if CAUSAL:
                                both = tl.sum(pairs * grad_pairs, 1)
                                grad_denominator += both * (1.0 / (written_scale * UNIT * pair_scale))
                            grad_denominator *= -rd
                            if HAS_GRAD_NORMALIZER:
                                if v == 0:  # the blocks of the value dimensions add up
                                    grad_denominator += load_row(GradNormalizer + token, first, 1, count, 0.0, T)
                            z_grad = grad_denominator
                            if HAS_DECAY:
                                z_grad *= from_start
                            grad_gamma += z_grad[:, None] * z[None, :]
                            if CAUSAL:
                                store_row(DD + token * NV + v * N, grad_denominator, first, count, T)
                        else:
                            grad_denominator = load_row(DD + token * NV + v * N, first, 1, count, 0.0, T)
                    if CAUSAL:
                        if KEYS:
                            pairs_operand = operand(pairs * (1.0 / UNIT), EXACT)
                        # |dn . v| <= BV 2^28 in these units; the denominator's part may be larger
                        bound = BV * UNIT * UNIT
                        if NORMALIZE:
                            grad_pairs += (grad_denominator * pair_scale)[:, None]
                            largest_grad = tl.max(tl.abs(grad_denominator), 0)
                            bound += largest_grad * pair_scale
                        shrink = tile_scale(bound, EXACT)
                        grad_pairs_operand = operand(decayed(grad_pairs * shrink, decays, HAS_DECAY), EXACT)
                        pair_scale *= shrink

                    # The query
                    if QUERIES:
                        if CAUSAL:
                            from_pairs = product(grad_pairs_operand, written, PRECISION)
                            grad_gamma += from_pairs * (1.0 / (pair_scale * written_scale))
                        grad_query, total_read = logit_gradient(grad_gamma, gamma_query, EXACT)
                        if HAS_DECAY:
                            store_row(Reads + token * NV + v * N, total_read, first, count, T)
                        grad_linear, grad_quadratic, grad_bias = logits_backward(
                            grad_linear, grad_quadratic, grad_bias,
                            GQ + v * stride_gqv + batch * stride_gqb + head.to(tl.int64) * stride_gqh, query_pointer, first, grad_query,
                            stride_gqn, stride_qn, count, D, GradLinear, GradQuadratic, Coefficients,
                            linear, quadratic, linear_rest, quadratic_rest,
                            T, CP, DP, BD, EVEN_D, IN_REGISTERS, EXACT, PRECISION,
                        )  # fmt: skip
                    elif HAS_DECAY:
                        read_minus_write += load_row(Reads + token * NV + v * N, first, 1, count, 0.0, T)

                    # What the chunk wrote, and the state before it
                    if CAUSAL and KEYS:
                        from_pairs = product(tl.trans(grad_pairs_operand), gamma_query, PRECISION)
                        grad_written += from_pairs * (1.0 / (pair_scale * UNIT))
                        from_pairs = product(tl.trans(pairs_operand), dn_operand, PRECISION)
                        grad_value += from_pairs * (1.0 / (written_scale * dn_scale))
                        faded_columns = tl.trans(faded)
                        G += product(faded_columns, dn_operand, PRECISION) * (1.0 / (UNIT * dn_scale))
                        largest += T * largest_dn
                        if NORMALIZE:
                            z_scale = tile_scale(largest_grad, EXACT)
                            from_reads = add_column_sums(
                                tl.zeros([CP], tl.float32),
                                faded_columns,
                                operand(grad_denominator * z_scale, EXACT),
                                PRECISION,
                            )
                            g += from_reads * (1.0 / (UNIT * z_scale))

            if KEYS:
                # From the state after the chunk
                from_state = product(value, tl.trans(G_operand), PRECISION)
                from_state = from_state * (1.0 / (value_scale * G_scale)) + g_after[None, :]
                value_from_state = product(written, G_operand, PRECISION) * (1.0 / (written_scale * G_scale))
                if HAS_DECAY:
                    from_state *= to_end[:, None]
                    value_from_state *= to_end[:, None]
                    kept = tl.sum(from_state * gamma_key.to(tl.float32), 1) * (1.0 / UNIT)
                    if HAS_WEIGHT:
                        kept *= weight
                    else:
                        kept = tl.where(tl.arange(0, T) < count, kept, 0.0)
                    spanning = tl.sum(kept, 0) + carried * keep
                grad_value += value_from_state
                grad_written += from_state
                store_tile(
                    GV + batch * stride_gvb + mixture.to(tl.int64) * stride_gvh,
                    grad_value, first, columns, stride_gvn, count, DV, T, EVEN_V,
                )  # fmt: skip

                # The key
                of_token = slab * N
                if GRAD_WEIGHT:
                    grad_weight = tl.sum(grad_written * gamma_key.to(tl.float32), 1) * (1.0 / UNIT)
                    store_row(GW + of_token, grad_weight, first, count, T)
                if HAS_WEIGHT:
                    grad_written *= weight[:, None]
                grad_logits, total_write = logit_gradient(grad_written, gamma_key, EXACT)
                if HAS_DECAY:
                    # Backwards running sum, as what all but the tokens before add up to
                    read_minus_write -= total_write
                    before = tl.cumsum(read_minus_write, 0) - read_minus_write
                    spanning += tl.sum(read_minus_write, 0) - before
                    log_decay = load_row(decay_pointer, first, stride_an, count, 0.0, T)
                    store_row(GLA + of_token, tl.where(log_decay < RESET, 0.0, spanning), first, count, T)
                grad_linear, grad_quadratic, grad_bias = logits_backward(
                    grad_linear, grad_quadratic, grad_bias,
                    GK + v * stride_gkv + batch * stride_gkb + mixture.to(tl.int64) * stride_gkh, key_pointer, first, grad_logits,
                    stride_gkn, stride_kn, count, D, GradLinear, GradQuadratic, Coefficients,
                    linear, quadratic, linear_rest, quadratic_rest,
                    T, CP, DP, BD, EVEN_D, IN_REGISTERS, EXACT, PRECISION,
                )  # fmt: skip

        if KEYS and GRAD_FIRST:
            tl.store(GradFirst + slab * CP * (BV + 1) + here(of_state, item), G)
            tl.store(GradFirst + slab * CP * (BV + 1) + CP * BV + here(of_norm, item), g)

    tl.store(GradBias + partial * CP + of_norm, grad_bias)
    if IN_REGISTERS:
        offsets = tl.arange(0, CP)[:, None] * DP + tl.arange(0, BD)[None, :]
        tl.store(GradLinear + offsets, grad_linear)
        tl.store(GradQuadratic + offsets, grad_quadratic)
