# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the kernels of the window share: the places of tokens, which query sees which key, and the logits of near keys, of sink
tokens and of the memory, in base 2.
"""

import triton
import triton.language as tl

from ...attention.triton.tiles import LOG2E, load_row, load_tile, product, rounded
from ..functional import LOG_NOTHING as NATURAL_LOG_NOTHING


SINKS = tl.constexpr(16)  # sink tokens of a tile: the least that matrix units multiply
FAR = tl.constexpr(1 << 29)  # where keys stand that nobody sees
LOWEST = tl.constexpr(-1e30)  # a maximum that is no infinity: differences to it are numbers
LOG_NOTHING = tl.constexpr(NATURAL_LOG_NOTHING)  # a memory that weighs less is none


@triton.jit
def locate(program, blocks, HQ, R: tl.constexpr):
    """Block of queries, head and batch. Heads that share keys run side by side, so that the keys are in the cache."""
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
    """The places of keys first .. first + T, [T]."""
    keys = tl.arange(0, T)
    is_seen = keys < count
    if HAS_VALID:
        is_seen = tl.load(Valid + first + keys, mask=is_seen, other=0) != 0
    return tl.where(is_seen, first + keys - P, FAR)


@triton.jit
def load_runs(Runs, first, count, T: tl.constexpr, HAS_RUNS: tl.constexpr):
    """The runs of tokens first .. first + T, [T]."""
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
    """tanh x with a relative error of 6e-7."""
    small = x * (1.0 - x * x * (0.33333333 - x * x * 0.13333333))
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -large, large))


@triton.jit
def scaled(logits, scale, cap, SOFTCAP: tl.constexpr):
    """From q . k: s in base 2, and the factor of ds that the soft cap adds."""
    if SOFTCAP:
        tangent = hyperbolic_tangent(logits * scale)
        logits = cap * tangent
        slope = 1.0 - tangent * tangent
    else:
        logits *= scale
        slope = 1.0
    return logits, slope


@triton.jit
def near_logits(logits, distance, scale, cap, W, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr):
    """The same, -inf for keys that are not near."""
    logits, slope = scaled(logits, scale, cap, SOFTCAP)
    # One comparison each: negative numbers are large without a sign
    if CAUSAL:
        near = distance.to(tl.uint32, bitcast=True) < W
    else:
        near = (distance + W).to(tl.uint32, bitcast=True) < 2 * W + 1
    return tl.where(near, logits, float("-inf")), slope


@triton.jit
def memory_logit(query, LogWeight, asked, stride, Bias, Slope, head, columns, D, T: tl.constexpr):
    """
    m in base 2 [T] from the queries that weigh the memory, -inf if the memory is empty or the query has none, and u [DP].
    """
    log_weight = tl.load(LogWeight + tl.arange(0, T) * stride, mask=asked, other=float("-inf")).to(tl.float32)
    slope = tl.load(Slope + head * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    logit = tl.sum(query.to(tl.float32) * slope[None, :], 1) + tl.load(Bias + head).to(tl.float32)
    return tl.where(log_weight < LOG_NOTHING, float("-inf"), (logit + log_weight) * LOG2E), slope


@triton.jit
def asked_queries(first, skip, N, T: tl.constexpr):
    """Which of the queries first .. first + T have a memory, [T]."""
    queries = first + tl.arange(0, T)
    return (queries >= skip) & (queries < N)


@triton.jit
def row_of(pointer, first, skip, stride):
    """The row of the read of query `first`, in rows that begin with query `skip`."""
    return pointer + (first - skip).to(tl.int64) * stride


@triton.jit
def read_tile(asked, columns, stride, num_columns, T: tl.constexpr, EVEN: tl.constexpr):
    """Offsets and mask of the reads of queries, some of which have no memory."""
    mask = asked[:, None]
    if not EVEN:
        mask = mask & (columns < num_columns)[None, :]
    return tl.arange(0, T)[:, None] * stride + columns[None, :], mask


@triton.jit
def sink_logits(
    query, SinkK, Visible, sink, num_sinks, first, blind, P, N, W, columns, stride, D, scale, cap,
    T: tl.constexpr, EVEN_D: tl.constexpr, HAS_VISIBLE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    For the sink tokens from `sink` on: the keys [SINKS, DP]; s in base 2 [SINKS, T], -inf if queries first .. first + T do
    not see them; and the factor of ds that the soft cap adds. Sink tokens are rows, because there are few of them, and
    matrix units take 16 rows of any width.
    """
    key = load_tile(SinkK, sink, columns, stride, num_sinks - sink, D, SINKS, EVEN_D)
    logits, slope = scaled(product(key, tl.trans(query), PRECISION), scale, cap, SOFTCAP)
    sinks, queries = sink + tl.arange(0, SINKS)[:, None], tl.arange(0, T)[None, :]
    seen = (sinks < num_sinks) & (first + queries < N)
    if HAS_VISIBLE:
        Visible = row_of(Visible, first, blind, num_sinks)
        seen = tl.load(Visible + queries * num_sinks + sinks, mask=seen & (first + queries >= blind), other=0) != 0
    else:  # the first of the keys, where they have left the window
        seen = seen & (first + queries - (sinks - P) >= W)
    return key, tl.where(seen, logits, float("-inf")), slope


@triton.jit
def attend_more(largest, total, numerator, logits, value, PRECISION: tl.constexpr):
    """The running maximum and sums after further keys with logits [T, n] and values [n, DVP]."""
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, 1)
    numerator = product(rounded(weights, value.dtype), value, PRECISION, numerator * shrink[:, None])
    return new_largest, total, numerator


@triton.jit
def finite_log_sum(LogSum, first, count, T: tl.constexpr):
    """l in base 2; inf for rows that see nothing or do not exist, because e^(s - l) is then 0."""
    log_sum = load_row(LogSum, first, 1, count, float("inf"), T) * LOG2E
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum)
