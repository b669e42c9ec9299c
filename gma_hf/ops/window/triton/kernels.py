# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The equations of `window_softmax` in fused GPU kernels. Logits stay on the chip, and the memory acts as one more token.

    attend_kernel           o and l = log D                                            a block of queries of one head
    grad_queries_kernel     dq, dr, dm, delta for the next kernel; the parts of        the same
                            dk, dv of the sink tokens that come from this block
    grad_keys_kernel        dk, dv                                                     a block of keys of one key head

The running maximum and sums of the softmax start from the memory, e^m r and e^m, and from the sink. Then follow sink tokens
and blocks of near keys, as in FlashAttention. Blocks of keys loop over the queries of all heads of their group. The parts of
all blocks of queries for sink tokens are added up afterwards. The kernels use no atomics, so the same call gives the same
bits. Matrix units multiply in the dtype of the inputs (float32 as three TF32 products); logits, exponentials and sums are
float32.

query [B, HQ, N, D], key [B, HK, NK, D], value [B, HK, NK, DV], valid [B or 1, NK], runs [B, NK], read [B, HQ, NM, DV],
log_weight [B, HQ, NM], weighing_query [B, HQ, N, D], memory_bias and sinks [HQ], memory_query [HQ, D], sink_key [B, HK, S, D],
sink_value [B, HK, S, DV], visible [B or 1, NS, S]; R = HQ / HK. Key j stands at j - P, P = NK - N, row i of the reads at
i + skip, skip = N - NM, row i of the visibility of sink tokens at i + blind, blind = N - NS.
"""

import triton
import triton.language as tl

from ...attention.triton.tiles import LN2, LOG2E, load_row, load_tile, product, rounded, store_row, store_tile
from .tiles import (
    LOWEST,
    SINKS,
    asked_queries,
    attend_more,
    distances,
    finite_log_sum,
    key_places,
    load_runs,
    locate,
    memory_logit,
    near_keys,
    near_logits,
    read_tile,
    row_of,
    sink_logits,
)


# Arguments that a kernel is not compiled anew for: what depends on lengths, or says nothing about alignment
OF_LENGTH = ["stride_valid", "stride_runs", "N", "NK", "HQ", "W", "blocks"]


@triton.jit(do_not_specialize=[*OF_LENGTH, "stride_wb", "stride_wh", "stride_visible", "skip", "blind", "num_sinks"])
def attend_kernel(
    Q, K, V, Valid, Runs, Read, LogWeight, WeighingQ, Bias, Slope, Sinks, SinkK, SinkV, Visible, Output, LogSum,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rn, stride_wb, stride_wh, stride_wn, stride_ob, stride_oh, stride_on,
    stride_ub, stride_uh, stride_un, stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn,
    stride_valid, stride_runs, stride_visible, N, NK, skip, blind, num_sinks, D, DV, HQ, W, blocks, scale, cap,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_RUNS: tl.constexpr,
    HAS_WEIGHING: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SINK_TOKENS: tl.constexpr, HAS_VISIBLE: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, batch = locate(tl.program_id(0), blocks, HQ, R)
    first = block * BM
    kv_head, row_head = (head // R).to(tl.int64), head.to(tl.int64)
    P = NK - N
    count = N - first
    columns, value_columns = tl.arange(0, DP), tl.arange(0, DVP)
    places = first + tl.arange(0, BM)
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    if HAS_VALID:
        Valid += batch * stride_valid
    if HAS_RUNS:
        Runs += batch * stride_runs

    query = load_tile(Q + batch * stride_qb + row_head * stride_qh, first, columns, stride_qn, count, D, BM, EVEN_D)
    asked = asked_queries(first, skip, N, BM)
    LogWeight = row_of(LogWeight + batch * stride_wb + row_head * stride_wh, first, skip, stride_wn)
    weighing = query
    if HAS_WEIGHING:
        WeighingQ += batch * stride_ub + row_head * stride_uh
        weighing = load_tile(WeighingQ, first, columns, stride_un, count, D, BM, EVEN_D)
    logit = memory_logit(weighing, LogWeight, asked, stride_wn, Bias, Slope, head, columns, D, BM)[0]
    Read = row_of(Read + batch * stride_rb + row_head * stride_rh, first, skip, stride_rn)
    offsets, mask = read_tile(asked, value_columns, stride_rn, DV, BM, EVEN_V)
    read = tl.load(Read + offsets, mask=mask, other=0.0).to(tl.float32)
    # Relative to the largest term
    largest = tl.maximum(logit, LOWEST)
    if HAS_SINKS:
        sink = tl.load(Sinks + head).to(tl.float32) * LOG2E
        largest = tl.maximum(largest, sink)
    total = tl.exp2(logit - largest)
    numerator = read * total[:, None]
    if HAS_SINKS:
        total += tl.exp2(sink - largest)
    if HAS_SINK_TOKENS:
        SinkK += batch * stride_skb + kv_head * stride_skh
        SinkV += batch * stride_svb + kv_head * stride_svh
        if HAS_VISIBLE:
            Visible += batch * stride_visible
        for tile in tl.range(0, tl.cdiv(num_sinks, SINKS), num_stages=1):
            first_sink = tile * SINKS
            logits = sink_logits(
                query, SinkK, Visible, first_sink, num_sinks, first, blind, P, N, W, columns, stride_skn, D, scale, cap,
                BM, EVEN_D, HAS_VISIBLE, SOFTCAP, PRECISION,
            )[1]  # fmt: skip
            value = load_tile(SinkV, first_sink, value_columns, stride_svn, num_sinks - first_sink, DV, SINKS, EVEN_V)
            largest, total, numerator = attend_more(largest, total, numerator, tl.trans(logits), value, PRECISION)
    runs = load_runs(Runs, first + P, count, BM, HAS_RUNS)
    start, stop = near_keys(first, P, NK, W, BM, CAUSAL)
    for i in tl.range(tl.cdiv(stop - start, BN)):
        key_first = start + i * BN
        keys_left = stop - key_first
        key = load_tile(K, key_first, columns, stride_kn, keys_left, D, BN, EVEN_D)
        distance = distances(
            places[:, None], key_places(Valid, key_first, keys_left, P, BN, HAS_VALID)[None, :],
            runs[:, None], load_runs(Runs, key_first, keys_left, BN, HAS_RUNS)[None, :], HAS_RUNS,
        )  # fmt: skip
        logits = near_logits(product(query, tl.trans(key), PRECISION), distance, scale, cap, W, CAUSAL, SOFTCAP)[0]
        value = load_tile(V, key_first, value_columns, stride_vn, keys_left, DV, BN, EVEN_V)
        largest, total, numerator = attend_more(largest, total, numerator, logits, value, PRECISION)

    is_empty = total == 0
    numerator *= (1.0 / tl.where(is_empty, 1.0, total))[:, None]
    store_tile(
        Output + batch * stride_ob + row_head * stride_oh, numerator,
        first, value_columns, stride_on, count, DV, BM, EVEN_V,
    )  # fmt: skip
    log_sum = tl.where(is_empty, float("-inf"), largest + tl.log2(tl.where(is_empty, 1.0, total)))
    store_row(LogSum + (batch * HQ + head) * N, log_sum * LN2, first, count, BM)


@triton.jit(do_not_specialize=[*OF_LENGTH, "stride_wb", "stride_wh", "stride_visible", "skip", "blind", "num_sinks"])
def grad_queries_kernel(
    Q, K, V, Valid, Runs, Read, LogWeight, WeighingQ, Bias, Slope, SinkK, SinkV, Visible, Output, LogSum, GradOutput,
    GradQ, GradRead, GradLogit, GradWeighingQ, GradSlope, GradSinks, Delta,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rn, stride_wb, stride_wh, stride_wn, stride_ob, stride_oh, stride_on,
    stride_ub, stride_uh, stride_un, stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn,
    stride_gb, stride_gh, stride_gn, stride_dqb, stride_dqh, stride_dqn, stride_drb, stride_drh, stride_drn,
    stride_dub, stride_duh, stride_dun,
    stride_valid, stride_runs, stride_visible, N, NK, skip, blind, num_sinks, D, DV, HQ, W, blocks, scaling, scale, cap,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_RUNS: tl.constexpr,
    HAS_WEIGHING: tl.constexpr, HAS_SINK_TOKENS: tl.constexpr, HAS_VISIBLE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, batch = locate(tl.program_id(0), blocks, HQ, R)
    first = block * BM
    kv_head, row_head = (head // R).to(tl.int64), head.to(tl.int64)
    P = NK - N
    count = N - first
    columns, value_columns = tl.arange(0, DP), tl.arange(0, DVP)
    places = first + tl.arange(0, BM)
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    if HAS_VALID:
        Valid += batch * stride_valid
    if HAS_RUNS:
        Runs += batch * stride_runs
    row = (batch * HQ + head) * N

    grad = load_tile(
        GradOutput + batch * stride_gb + row_head * stride_gh, first, value_columns, stride_gn, count, DV, BM, EVEN_V
    )
    output = load_tile(
        Output + batch * stride_ob + row_head * stride_oh, first, value_columns, stride_on, count, DV, BM, EVEN_V
    )
    delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    store_row(Delta + row, delta, first, count, BM)
    log_sum = finite_log_sum(LogSum + row, first, count, BM)
    query = load_tile(Q + batch * stride_qb + row_head * stride_qh, first, columns, stride_qn, count, D, BM, EVEN_D)

    # What the memory read
    asked = asked_queries(first, skip, N, BM)
    LogWeight = row_of(LogWeight + batch * stride_wb + row_head * stride_wh, first, skip, stride_wn)
    weighing = query
    if HAS_WEIGHING:
        WeighingQ += batch * stride_ub + row_head * stride_uh
        weighing = load_tile(WeighingQ, first, columns, stride_un, count, D, BM, EVEN_D)
    logit, slope = memory_logit(weighing, LogWeight, asked, stride_wn, Bias, Slope, head, columns, D, BM)
    factor = tl.exp2(logit - log_sum)
    Read = row_of(Read + batch * stride_rb + row_head * stride_rh, first, skip, stride_rn)
    offsets, mask = read_tile(asked, value_columns, stride_rn, DV, BM, EVEN_V)
    read = tl.load(Read + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_logit = factor * (tl.sum(grad.to(tl.float32) * read, 1) - delta)
    GradRead = row_of(GradRead + batch * stride_drb + row_head * stride_drh, first, skip, stride_drn)
    offsets, mask = read_tile(asked, value_columns, stride_drn, DV, BM, EVEN_V)
    grad_read = rounded(grad.to(tl.float32) * factor[:, None], GradRead.dtype.element_ty)
    tl.store(GradRead + offsets, grad_read, mask=mask)
    store_row(GradLogit + row, grad_logit, first, count, BM)
    grad_slope = tl.sum(weighing.to(tl.float32) * grad_logit[:, None], 0)
    tl.store(GradSlope + ((batch * HQ + head) * blocks + block) * D + columns, grad_slope, mask=columns < D)

    grad_weighing = grad_logit[:, None] * slope[None, :]
    if HAS_WEIGHING:
        GradWeighingQ += batch * stride_dub + row_head * stride_duh
        store_tile(GradWeighingQ, grad_weighing, first, columns, stride_dun, count, D, BM, EVEN_D)

    grad_query = tl.zeros([BM, DP], tl.float32)
    if HAS_SINK_TOKENS:
        SinkK += batch * stride_skb + kv_head * stride_skh
        SinkV += batch * stride_svb + kv_head * stride_svh
        if HAS_VISIBLE:
            Visible += batch * stride_visible
        GradSinks += ((batch * HQ + head) * blocks + block) * num_sinks * (D + DV)
        for tile in tl.range(0, tl.cdiv(num_sinks, SINKS), num_stages=1):
            first_sink = tile * SINKS
            sinks_left = num_sinks - first_sink
            key, logits, slope_of_cap = sink_logits(
                query, SinkK, Visible, first_sink, num_sinks, first, blind, P, N, W, columns, stride_skn, D, scale, cap,
                BM, EVEN_D, HAS_VISIBLE, SOFTCAP, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(logits - log_sum[None, :])
            grad_value = product(rounded(weights, grad.dtype), grad, PRECISION)
            store_tile(GradSinks + D, grad_value, first_sink, value_columns, D + DV, sinks_left, DV, SINKS, EVEN_V)
            value = load_tile(SinkV, first_sink, value_columns, stride_svn, sinks_left, DV, SINKS, EVEN_V)
            grad_logits = weights * slope_of_cap * (product(value, tl.trans(grad), PRECISION) - delta[None, :])
            grad_logits = rounded(grad_logits, key.dtype)
            grad_key = product(grad_logits, query, PRECISION) * scaling
            store_tile(GradSinks, grad_key, first_sink, columns, D + DV, sinks_left, D, SINKS, EVEN_D)
            grad_query = product(tl.trans(grad_logits), key, PRECISION, grad_query)

    runs = load_runs(Runs, first + P, count, BM, HAS_RUNS)
    start, stop = near_keys(first, P, NK, W, BM, CAUSAL)
    for i in tl.range(tl.cdiv(stop - start, BN)):
        key_first = start + i * BN
        keys_left = stop - key_first
        key = load_tile(K, key_first, columns, stride_kn, keys_left, D, BN, EVEN_D)
        distance = distances(
            places[:, None], key_places(Valid, key_first, keys_left, P, BN, HAS_VALID)[None, :],
            runs[:, None], load_runs(Runs, key_first, keys_left, BN, HAS_RUNS)[None, :], HAS_RUNS,
        )  # fmt: skip
        logits, slope_of_cap = near_logits(
            product(query, tl.trans(key), PRECISION), distance, scale, cap, W, CAUSAL, SOFTCAP
        )
        weights = tl.exp2(logits - log_sum[:, None])
        value = load_tile(V, key_first, value_columns, stride_vn, keys_left, DV, BN, EVEN_V)
        grad_logits = weights * slope_of_cap * (product(grad, tl.trans(value), PRECISION) - delta[:, None])
        grad_query = product(rounded(grad_logits, key.dtype), key, PRECISION, grad_query)
    grad_query *= scaling
    if not HAS_WEIGHING:
        grad_query += grad_weighing
    store_tile(
        GradQ + batch * stride_dqb + row_head * stride_dqh, grad_query,
        first, columns, stride_dqn, count, D, BM, EVEN_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=OF_LENGTH)
def grad_keys_kernel(
    Q, K, V, Valid, Runs, LogSum, GradOutput, Delta, GradK, GradV,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_valid, stride_runs, N, NK, D, DV, HQ, W, blocks, scaling, scale, cap,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_RUNS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program % blocks * BN
    kv_head = (program // blocks % (HQ // R)).to(tl.int64)
    batch = (program // (blocks * (HQ // R))).to(tl.int64)
    P = NK - N
    count = NK - first
    columns, value_columns = tl.arange(0, DP), tl.arange(0, DVP)
    if HAS_VALID:
        Valid += batch * stride_valid
    if HAS_RUNS:
        Runs += batch * stride_runs
    places = key_places(Valid, first, count, P, BN, HAS_VALID)
    key = load_tile(K + batch * stride_kb + kv_head * stride_kh, first, columns, stride_kn, count, D, BN, EVEN_D)
    value = load_tile(
        V + batch * stride_vb + kv_head * stride_vh, first, value_columns, stride_vn, count, DV, BN, EVEN_V
    )
    runs = load_runs(Runs, first, count, BN, HAS_RUNS)

    # The queries that see a key of the block, in blocks, of one head after the other
    if CAUSAL:
        start = tl.maximum(first - P, 0)
        stop = tl.minimum(first - P + BN + W - 1, N)
    else:
        start = tl.maximum(first - W, 0)
        stop = tl.minimum(first + BN + W, N)
    per_head = tl.maximum(tl.cdiv(stop - start, BM), 0)
    grad_key = tl.zeros([BN, DP], tl.float32)
    grad_value = tl.zeros([BN, DVP], tl.float32)
    for item in tl.range(0, R * per_head):
        head = kv_head * R + item // per_head
        query_first = start + item % per_head * BM
        queries_left = stop - query_first
        row = (batch * HQ + head) * N
        query = load_tile(
            Q + batch * stride_qb + head * stride_qh, query_first, columns, stride_qn, queries_left, D, BM, EVEN_D
        )
        distance = distances(
            (query_first + tl.arange(0, BM))[None, :], places[:, None],
            load_runs(Runs, P + query_first, queries_left, BM, HAS_RUNS)[None, :], runs[:, None], HAS_RUNS,
        )  # fmt: skip
        logits, slope_of_cap = near_logits(
            product(key, tl.trans(query), PRECISION), distance, scale, cap, W, CAUSAL, SOFTCAP
        )
        log_sum = finite_log_sum(LogSum + row, query_first, queries_left, BM)
        weights = tl.exp2(logits - log_sum[None, :])
        grad = load_tile(
            GradOutput + batch * stride_gb + head * stride_gh, query_first,
            value_columns, stride_gn, queries_left, DV, BM, EVEN_V,
        )  # fmt: skip
        grad_value = product(rounded(weights, grad.dtype), grad, PRECISION, grad_value)
        delta = load_row(Delta + row, query_first, 1, queries_left, 0.0, BM)
        grad_logits = weights * slope_of_cap * (product(value, tl.trans(grad), PRECISION) - delta[None, :])
        grad_key = product(rounded(grad_logits, query.dtype), query, PRECISION, grad_key)
    store_tile(
        GradK + batch * stride_dkb + kv_head * stride_dkh, grad_key * scaling,
        first, columns, stride_dkn, count, D, BN, EVEN_D,
    )  # fmt: skip
    store_tile(
        GradV + batch * stride_dvb + kv_head * stride_dvh, grad_value,
        first, value_columns, stride_dvn, count, DV, BN, EVEN_V,
    )  # fmt: skip
