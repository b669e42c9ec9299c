# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the kernels share: responsibilities of a tile of tokens, decays within it, operands of the matrix products.

    logits   = x @ linear^T + (x * x) @ quadratic^T + bias            (base 2, see `coefficients`)
    gamma    = 2^(logits - lse),      lse = log2 sum_c 2^logits_c
    rho      = sqrt(C) delta / sqrt(C |delta|^2 + CORRELATION_EPS),      delta = gamma - 1/C        (with correlation)

Precision. Tensor cores multiply 16-bit numbers. Two methods keep the results as accurate as float32 arithmetic on rounded
inputs:

- the logits, whose errors are exponentiated, split each factor into a sum of two bfloat16 numbers (x itself is one number);
- everything else is multiplied by a power of two that brings the largest element of the tile to about 2^14, and is then
  rounded to float16 (eleven bits). Elements 2^28 times smaller than the largest element still keep all their bits.
  Responsibilities are always multiplied by UNIT; EXACT kernels do this too, without any effect on the result.

`EXACT` kernels (float32 and float16 inputs) use float32 operands, and `PRECISION` in every product.
"""

import os

import triton
import triton.language as tl

from .. import mixture as plain


# Responsibilities and pair weights are at most 1 and are multiplied by this before they are rounded to float16.
UNIT = tl.constexpr(16384.0)
LOG2_UNIT = tl.constexpr(14.0)
# A log-decay below this is a reset: everything before is forgotten, exactly.
RESET = tl.constexpr(-30.0)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
CORRELATION_EPS = tl.constexpr(plain.CORRELATION_EPS)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def power_of_two(largest):
    """The power of two s with about 2^13 < s * largest <= 2^14; 1 for largest = 0."""
    exponent = 14.0 - tl.ceil(tl.log2(tl.maximum(largest, 1e-30)))
    return tl.where(largest > 0, tl.exp2(exponent), 1.0)


@triton.jit
def find_largest(x, weight):
    """The largest absolute value in x [T, columns]. Rows without weight (padding) do not count."""
    return tl.max(tl.where(weight > 0, tl.max(tl.abs(x), 1), 0.0), 0)


@triton.jit
def tile_scale(largest, EXACT: tl.constexpr):
    """The power of two that multiplies a tile before it becomes an operand."""
    if EXACT:
        scale = 1.0
    else:
        scale = power_of_two(largest)
    return scale


@triton.jit
def operand(x, EXACT: tl.constexpr):
    """An operand of a matrix product."""
    if EXACT:
        result = x
    elif INTERPRETED:
        result = x.to(tl.float16)
    else:  # two at a time: half the instructions that the compiler finds by itself
        result = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    return result


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """
    x in another dtype, rounded to nearest. The interpreter of Triton truncates bits that do not fit into bfloat16, and turns
    very large numbers into small ones.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, add_to=None):
    """a @ b (+ add_to) in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # which NumPy does not know: the same products in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, add_to, input_precision=PRECISION)


@triton.jit
def here(offsets, position):
    """
    The offsets, computed where they are needed.

    This adds 0, because positions are not negative. The compiler does not know this. So it does not compute addresses and
    masks once before the loop over positions, which would occupy hundreds of registers.
    """
    return offsets + tl.minimum(position, 0)


@triton.jit
def load_tile(
    pointer, first, columns, stride, count, num_columns, T: tl.constexpr, EVEN: tl.constexpr,
    POLICY: tl.constexpr = tl.constexpr(""),  # noqa: B008
):  # fmt: skip
    """
    Rows first .. first + T of a matrix whose rows are `stride` elements apart; zeros after `count` rows.

    A tile that is needed again much later is loaded with another POLICY. Otherwise the compiler recognises the same tile and
    keeps it, and all values computed from it, in registers that are needed elsewhere.
    """
    pointer += first.to(tl.int64) * stride
    rows = here(tl.arange(0, T), first)
    pointers = pointer + (rows[:, None] * stride + columns[None, :])
    mask = (rows < count)[:, None]
    if not EVEN:  # fewer columns than the tile has
        mask = mask & (columns < num_columns)[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def store_tile(pointer, x, first, columns, stride, count, num_columns, T: tl.constexpr, EVEN: tl.constexpr):
    pointer += first.to(tl.int64) * stride
    rows = here(tl.arange(0, T), first)
    pointers = pointer + (rows[:, None] * stride + columns[None, :])
    mask = (rows < count)[:, None]
    if not EVEN:
        mask = mask & (columns < num_columns)[None, :]
    tl.store(pointers, rounded(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_row(pointer, first, stride, count, other, T: tl.constexpr):
    """A number per token."""
    pointer += first.to(tl.int64) * stride
    rows = here(tl.arange(0, T), first)
    return tl.load(pointer + rows * stride, mask=rows < count, other=other).to(tl.float32)


@triton.jit
def store_row(pointer, x, first, count, T: tl.constexpr):
    rows = here(tl.arange(0, T), first)
    tl.store(pointer + first.to(tl.int64) + rows, x, mask=rows < count)


@triton.jit
def load_coefficients(pointer, block, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr):
    """Columns `block` of linear and quadratic [CP, BD], each as a main part and (unless EXACT) a correction."""
    offsets = tl.arange(0, CP)[:, None] * DP + block * BD + tl.arange(0, BD)[None, :]
    linear = tl.load(pointer + offsets)
    quadratic = tl.load(pointer + CP * DP + offsets)
    linear_rest, quadratic_rest = linear, quadratic
    if not EXACT:
        linear_rest = tl.load(pointer + 2 * CP * DP + offsets)
        quadratic_rest = tl.load(pointer + 3 * CP * DP + offsets)
    return linear, quadratic, linear_rest, quadratic_rest


@triton.jit
def square(x, EXACT: tl.constexpr):
    """x * x, rounded unless EXACT."""
    if EXACT:
        result = x * x
    elif INTERPRETED:
        x = tl.clamp(x.to(tl.float32), -1e12, 1e12)
        result = rounded(x * x, tl.bfloat16)
    else:  # two at a time; -0 is what addition does not change; beyond +-1e12 squares would not stay finite
        result = tl.inline_asm_elementwise(
            """{
            .reg .b32 zero, x, limit;
            mov.b32 zero, 0x80008000;
            mov.b32 limit, 0x53695369;
            min.bf16x2 x, $1, limit;
            mov.b32 limit, 0xd369d369;
            max.bf16x2 x, x, limit;
            fma.rn.bf16x2 $0, x, x, zero;
            }""",
            "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return result


@triton.jit
def square_rest(x):
    """The part of x * x that rounding removed: exact for bfloat16."""
    if INTERPRETED:
        main = square(x, False).to(tl.float32)
        x = tl.clamp(x.to(tl.float32), -1e12, 1e12)
        result = rounded(x * x - main, tl.bfloat16)
    else:
        result = tl.inline_asm_elementwise(
            """{
            .reg .b32 zero, main, x, limit;
            mov.b32 zero, 0x80008000;
            mov.b32 limit, 0x53695369;
            min.bf16x2 x, $1, limit;
            mov.b32 limit, 0xd369d369;
            max.bf16x2 x, x, limit;
            fma.rn.bf16x2 main, x, x, zero;
            neg.bf16x2 main, main;
            fma.rn.bf16x2 $0, x, x, main;
            }""",
            "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return result


@triton.jit
def add_logits(
    logits, x, linear, quadratic, linear_rest, quadratic_rest, EXACT: tl.constexpr, PRECISION: tl.constexpr
):
    """logits + x @ linear^T + (x * x) @ quadratic^T."""
    if not EXACT:
        logits = product(x, tl.trans(linear_rest), PRECISION, logits)
        logits = product(square_rest(x), tl.trans(quadratic), PRECISION, logits)
    logits = product(x, tl.trans(linear), PRECISION, logits)
    main = square(x, EXACT)
    if not EXACT:
        logits = product(main, tl.trans(quadratic_rest), PRECISION, logits)
    return product(main, tl.trans(quadratic), PRECISION, logits)


@triton.jit
def compute_tile(x, EXACT: tl.constexpr):
    if EXACT:
        x = tl.clamp(x.to(tl.float32), -1e12, 1e12)  # so that squares are finite
    return x


@triton.jit
def tile_logits(
    X, first, stride, count, D, coefficients, bias, linear, quadratic, linear_rest, quadratic_rest,
    T: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, EVEN_D: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [T, CP] of rows first .. first + count of X [N, D]. The first block of the coefficients is on the chip already."""
    columns = tl.arange(0, BD)
    logits = tl.zeros([T, CP], tl.float32) + bias[None, :]
    x = compute_tile(load_tile(X, first, columns, stride, count, D, T, EVEN_D), EXACT)
    logits = add_logits(logits, x, linear, quadratic, linear_rest, quadratic_rest, EXACT, PRECISION)
    for block in tl.static_range(1, DP // BD):
        x = compute_tile(load_tile(X, first, block * BD + columns, stride, count, D, T, EVEN_D), EXACT)
        l1, q1, l2, q2 = load_coefficients(here(coefficients, first), block, CP, DP, BD, EXACT)
        logits = add_logits(logits, x, l1, q1, l2, q2, EXACT, PRECISION)
    return logits


@triton.jit
def responsibilities(logits):
    """UNIT times the responsibilities [T, CP]."""
    likelihoods = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return likelihoods * (1.0 / tl.sum(likelihoods, 1) * UNIT)[:, None]


@triton.jit
def correlated(gamma, C, columns):
    """UNIT times rho, and sqrt(C) / sqrt(C |gamma - 1/C|^2 + CORRELATION_EPS) for every row, from UNIT times gamma."""
    delta = tl.where(columns < C, gamma * (1.0 / UNIT) - 1.0 / C, 0.0)
    inverse_length = tl.rsqrt(tl.sum(delta * delta, 1) + CORRELATION_EPS / C)
    return delta * (inverse_length * UNIT)[:, None], inverse_length


@triton.jit
def route(logits, C, CP: tl.constexpr, CORRELATE: tl.constexpr):
    """
    UNIT times the weights [T, CP] with which tokens write to the components and read from them: gamma or, if CORRELATE, rho.
    """
    gamma = responsibilities(logits)
    if CORRELATE:
        gamma, _ = correlated(gamma, C, tl.arange(0, CP)[None, :])
    return gamma


@triton.jit
def ones(T: tl.constexpr, dtype: tl.constexpr):
    """[T], by way of float32, because the interpreter of Triton 3.6 has no bfloat16 constants."""
    return tl.full([T], 1.0, tl.float32).to(dtype)


@triton.jit
def add_column_sums(sums, transposed, weights, PRECISION: tl.constexpr):
    """
    sums [CP] + transposed [CP, T] @ weights [T]: the matrix unit is faster than a sum over threads.

    The weights fill 64 equal columns. 16 would be enough, but Triton 3.6 then gave wrong sums (or an illegal address) on an
    H100.
    """
    columns = tl.zeros([1, 64], tl.float32).to(weights.dtype)
    return sums + tl.sum(product(transposed, weights[:, None] + columns, PRECISION), 1) * 0.015625


@triton.jit
def load_decays(pointer, first, stride, count, T: tl.constexpr):
    """Running sums of the (base-2) log-decays of a chunk, running counts of its resets, and both in total."""
    log_decay = load_row(pointer, first, stride, count, 0.0, T)
    is_reset = log_decay < RESET
    log_decay = tl.where(is_reset, 0.0, log_decay) * LOG2E
    resets = is_reset.to(tl.float32)
    return tl.cumsum(log_decay, 0), tl.cumsum(resets, 0), tl.sum(log_decay, 0), tl.sum(resets, 0)


@triton.jit
def visible_pairs(first, T: tl.constexpr, STRICT: tl.constexpr):
    """Whether row i reads row j: j <= i, or j < i if STRICT."""
    columns = tl.arange(0, T)
    rows = here(columns, first)
    if STRICT:
        rows -= 1
    return rows[:, None] >= columns[None, :]


@triton.jit
def pair_factors(sums, resets, first, T: tl.constexpr, STRICT: tl.constexpr, HAS_DECAY: tl.constexpr):
    """
    1 / UNIT times the part of the write of row j that is left at row i, [T, T]; zero for pairs that are not visible. Without
    decays, whether the pair is visible.
    """
    visible = visible_pairs(first, T, STRICT)
    if HAS_DECAY:
        visible = visible & (resets[:, None] == resets[None, :])
        factors = tl.exp2(tl.where(visible, (sums - LOG2_UNIT)[:, None] - sums[None, :], -1e4))
    else:
        factors = visible
    return factors


@triton.jit
def decayed(pairs, scale, factors, HAS_DECAY: tl.constexpr):
    """Pair weights times a scale, 1 / UNIT and `pair_factors`."""
    if HAS_DECAY:
        pairs *= factors * scale
    else:
        pairs = tl.where(factors, pairs * (scale * (1.0 / UNIT)), 0.0)
    return pairs


@triton.jit
def load_value(
    V, first, columns, stride, count, DV, scale,
    T: tl.constexpr, EVEN_V: tl.constexpr, HAS_WEIGHT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """
    Values of a chunk times their scale, as an operand. Padding has the weight 0 and may hold anything, NaN included; other
    values are below the limit.
    """
    value = load_tile(V, first, columns, stride, count, DV, T, EVEN_V).to(tl.float32) * scale
    if HAS_WEIGHT:
        if EXACT:
            limit = 1e30
        else:
            limit = 60000.0
        value = tl.minimum(tl.maximum(value, -limit), limit)
    return operand(value, EXACT)


@triton.jit
def load_state(
    States, Scales, slab, chunk, chunks, v,
    CP: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """
    Columns `v` of the state of a chunk [CP, BV] as an operand, and its scale; in bidirectional calls, of the one state in
    float32.
    """
    offsets = tl.arange(0, CP)[:, None] * (NV * BV) + v * BV + tl.arange(0, BV)[None, :]
    if CAUSAL:
        state = tl.load(States + (slab * chunks + chunk) * (CP * NV * BV) + offsets)
        scale = tl.load(Scales + (slab * NV + v) * chunks + chunk)
    else:
        state = tl.load(States + slab * (CP * (NV * BV + 1)) + offsets)
        scale = tile_scale(tl.max(tl.max(tl.abs(state), 1), 0), EXACT)
        state = operand(state * scale, EXACT)
    return state, scale


@triton.jit
def load_norm(States, Norms, slab, chunk, chunks, CP: tl.constexpr, DVP: tl.constexpr, CAUSAL: tl.constexpr):
    """z, or its gradient, of the state of a chunk [CP]."""
    if CAUSAL:
        result = tl.load(Norms + (slab * chunks + chunk) * CP + tl.arange(0, CP))
    else:
        result = tl.load(States + slab * (CP * (DVP + 1)) + CP * DVP + tl.arange(0, CP))
    return result
