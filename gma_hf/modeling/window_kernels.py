# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The equations of `window_softmax` in fused GPU kernels: logits stay on the chip, the memory is one more thing to attend to.

    attend_kernel           o and l = log D                                            a block of queries of one head
    grad_queries_kernel     dq, dr, dm, and delta for the next kernel                  the same
    grad_keys_kernel        dk, dv                                                     a block of keys of one key head

The running maximum and sums of the softmax start from the memory, e^m r and e^m, and from the sink; then blocks of near
keys follow, as in FlashAttention. Blocks of keys walk over the queries of all heads of their group: no atomics, so the same
call gives the same bits. Matrix units multiply in the dtype of the inputs (float32 as three TF32 products); logits,
exponentials and sums are float32.

query [B, HQ, N, D], key [B, HK, NK, D], value [B, HK, NK, DV], valid [B or 1, NK], runs [B, NK], read [B, HQ, NM, DV],
log_weight [B, HQ, NM], memory_bias and sinks [HQ], memory_query [HQ, D]; R = HQ / HK. Key j stands at j - P, P = NK - N, row i
of what was read at i + skip, skip = N - NM.
"""

import triton
import triton.language as tl

from ..ops.fused.tiles import LN2, LOG2E, load_row, load_tile, product, rounded, store_row, store_tile
from .window_blocks import LOG_NOTHING as NATURAL_LOG_NOTHING


FAR = tl.constexpr(1 << 29)  # where keys stand that nobody sees
LOWEST = tl.constexpr(-1e30)  # a maximum that is no infinity: differences to it are numbers
LOG_NOTHING = tl.constexpr(NATURAL_LOG_NOTHING)  # a memory that weighs less is none


@triton.jit
def locate(program, blocks, HQ, R: tl.constexpr):
    """Block of queries, head and batch. Heads that share keys run side by side, and find them in the cache."""
    block = program // R % blocks
    head = program // (R * blocks) % (HQ // R) * R + program % R
    return block, head, (program // (HQ * blocks)).to(tl.int64)


@triton.jit
def near_keys(first, P, NK, W, T: tl.constexpr, CAUSAL: tl.constexpr):
    """The keys start .. stop that queries first .. first + T see."""
    if CAUSAL:
        start = first + P - W + 1
        stop = first + P + T
    else:
        start = first - W
        stop = first + T + W
    return tl.maximum(start, 0), tl.minimum(stop, NK)


@triton.jit
def key_places(Valid, first, count, P, T: tl.constexpr, HAS_VALID: tl.constexpr):
    """Where keys first .. first + T stand, [T]."""
    keys = tl.arange(0, T)
    is_seen = keys < count
    if HAS_VALID:
        is_seen = tl.load(Valid + first + keys, mask=is_seen, other=0) != 0
    return tl.where(is_seen, first + keys - P, FAR)


@triton.jit
def load_runs(Runs, first, count, T: tl.constexpr, HAS_RUNS: tl.constexpr):
    """Which runs tokens first .. first + T belong to, [T]."""
    tokens = tl.arange(0, T)
    if HAS_RUNS:
        runs = tl.load(Runs + first + tokens, mask=tokens < count, other=-1).to(tl.int32)
    else:
        runs = tokens
    return runs


@triton.jit
def distances(places, key_places, runs, key_runs, HAS_RUNS: tl.constexpr):
    """How far before a query a key stands; the arguments can be broadcast."""
    distance = places - key_places
    if HAS_RUNS:
        distance = tl.where(runs == key_runs, distance, -FAR)
    return distance


@triton.jit
def hyperbolic_tangent(x):
    """tanh x to 6e-7 of itself."""
    small = x * (1.0 - x * x * (0.33333333 - x * x * 0.13333333))
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -large, large))


@triton.jit
def near_logits(logits, distance, scale, cap, W, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr):
    """From q . k: s in base 2, -inf where the key is not near, and ds over what it would be without a cap."""
    if SOFTCAP:
        tangent = hyperbolic_tangent(logits * scale)
        logits = cap * tangent
        slope = 1.0 - tangent * tangent
    else:
        logits *= scale
        slope = 1.0
    # One comparison each: negative numbers are large without a sign
    if CAUSAL:
        near = distance.to(tl.uint32, bitcast=True) < W
    else:
        near = (distance + W).to(tl.uint32, bitcast=True) < 2 * W + 1
    return tl.where(near, logits, float("-inf")), slope


@triton.jit
def memory_logit(query, LogWeight, asked, stride, Bias, Slope, head, columns, D, T: tl.constexpr):
    """m in base 2 [T], -inf where the memory is empty or was not asked, and u [DP]."""
    log_weight = tl.load(LogWeight + tl.arange(0, T) * stride, mask=asked, other=float("-inf")).to(tl.float32)
    slope = tl.load(Slope + head * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    logit = tl.sum(query.to(tl.float32) * slope[None, :], 1) + tl.load(Bias + head).to(tl.float32)
    return tl.where(log_weight < LOG_NOTHING, float("-inf"), (logit + log_weight) * LOG2E), slope


@triton.jit
def asked_queries(first, skip, N, T: tl.constexpr):
    """Which of the queries first .. first + T the memory was asked by, [T]."""
    queries = first + tl.arange(0, T)
    return (queries >= skip) & (queries < N)


@triton.jit
def row_of(pointer, first, skip, stride):
    """Where what query `first` read stands, among rows that begin with query `skip`."""
    return pointer + (first - skip).to(tl.int64) * stride


@triton.jit
def read_tile(asked, columns, stride, num_columns, T: tl.constexpr, EVEN: tl.constexpr):
    """Offsets and mask of what was read by queries, some of which were not asked."""
    mask = asked[:, None]
    if not EVEN:
        mask = mask & (columns < num_columns)[None, :]
    return tl.arange(0, T)[:, None] * stride + columns[None, :], mask


@triton.jit(do_not_specialize=["N", "NK", "skip", "HQ", "W", "blocks"])
def attend_kernel(
    Q, K, V, Valid, Runs, Read, LogWeight, Bias, Slope, Sinks, Output, LogSum,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rn, stride_wb, stride_wh, stride_wn, stride_ob, stride_oh, stride_on,
    stride_valid, stride_runs, N, NK, skip, D, DV, HQ, W, blocks, scale, cap,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_RUNS: tl.constexpr,
    HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
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
    logit = memory_logit(query, LogWeight, asked, stride_wn, Bias, Slope, head, columns, D, BM)[0]
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
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        value = load_tile(V, key_first, value_columns, stride_vn, keys_left, DV, BN, EVEN_V)
        numerator = product(rounded(weights, value.dtype), value, PRECISION, numerator * shrink[:, None])
        largest = new_largest

    is_empty = total == 0
    numerator *= (1.0 / tl.where(is_empty, 1.0, total))[:, None]
    store_tile(
        Output + batch * stride_ob + row_head * stride_oh, numerator,
        first, value_columns, stride_on, count, DV, BM, EVEN_V,
    )  # fmt: skip
    log_sum = tl.where(is_empty, float("-inf"), largest + tl.log2(tl.where(is_empty, 1.0, total)))
    store_row(LogSum + (batch * HQ + head) * N, log_sum * LN2, first, count, BM)


@triton.jit
def finite_log_sum(LogSum, first, count, T: tl.constexpr):
    """l in base 2; inf where nothing is seen, and for rows that do not exist: e^(s - l) is 0 there."""
    log_sum = load_row(LogSum, first, 1, count, float("inf"), T) * LOG2E
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum)


@triton.jit(do_not_specialize=["N", "NK", "skip", "HQ", "W", "blocks"])
def grad_queries_kernel(
    Q, K, V, Valid, Runs, Read, LogWeight, Bias, Slope, Output, LogSum, GradOutput,
    GradQ, GradRead, GradLogit, GradSlope, Delta,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rn, stride_wb, stride_wh, stride_wn, stride_ob, stride_oh, stride_on,
    stride_gb, stride_gh, stride_gn, stride_dqb, stride_dqh, stride_dqn, stride_drb, stride_drh, stride_drn,
    stride_valid, stride_runs, N, NK, skip, D, DV, HQ, W, blocks, scaling, scale, cap,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_RUNS: tl.constexpr,
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
    logit, slope = memory_logit(query, LogWeight, asked, stride_wn, Bias, Slope, head, columns, D, BM)
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
    grad_slope = tl.sum(query.to(tl.float32) * grad_logit[:, None], 0)
    tl.store(GradSlope + ((batch * HQ + head) * blocks + block) * D + columns, grad_slope, mask=columns < D)

    runs = load_runs(Runs, first + P, count, BM, HAS_RUNS)
    start, stop = near_keys(first, P, NK, W, BM, CAUSAL)
    grad_query = tl.zeros([BM, DP], tl.float32)
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
    grad_query = grad_query * scaling + grad_logit[:, None] * slope[None, :]
    store_tile(
        GradQ + batch * stride_dqb + row_head * stride_dqh, grad_query,
        first, columns, stride_dqn, count, D, BM, EVEN_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "NK", "HQ", "W", "blocks"])
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
