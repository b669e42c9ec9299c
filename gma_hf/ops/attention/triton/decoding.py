# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Decoding: one launch advances all heads of a layer by one token, or by a few.

    S_t = a_t S_{t-1} + w_t gamma^K_t v_t^T,    z_t = a_t z_{t-1} + w_t gamma^K_t
    o_t = gamma^Q_t S_t / (gamma^Q_t z_t + eps)        or gamma^Q_t S_t; with correlation rho replaces gamma

A program has one mixture and a block of the value dimensions. The coefficients of the mixture and its part of the state stay
in registers. Everything is float32, because matrix units have nothing to do here.

query [B, HQ, N, D], key [B, HK, N, D], value [B, HK, N, DV], mixtures M -> output [B, HQ, N, DV], if requested the
denominators D [B, HQ, N] in float32, S [B, M, C, DV] and z [B, M, C] float32. In slots: row b continues from S[slots[b]] and
z[slots[b]] of S [slots, M, C, DV], z [slots, M, C], and writes them back there.

The prefill of engines is here, too: packed sequences with a state each, whose kernel is `fused_read_kernel`. One launch runs all
sequences and heads. A program has one sequence and one mixture, and carries the state from chunk to chunk. Tokens are read where
they are in their row, sequence s of row b from starts[b, s] to starts[b, s + 1]. States are read where they are in their slots,
and the last states replace them.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operators import on_one_device, vmapped_by_loops
from .coefficients import load_centred, log_priors
from .fused_outputs import fused_read_kernel
from .launching import empty_output, on_its_device, row_contiguous, strides
from .operators import INPUTS, empty_normalizer
from .passes import compute_coefficients, fused_constants, plan_of
from .plan import cdiv, padded
from .tiles import CORRELATION_EPS, LOG2E, rounded


VALUE_BLOCK = 32  # value dimensions of a program: few, because a small batch has few programs


@triton.jit
def route_of(X, columns, C, D, linear, quadratic, bias, CP: tl.constexpr, CORRELATE: tl.constexpr):
    """gamma or rho of one token, [CP]."""
    x = tl.load(X + columns, mask=columns < D, other=0.0).to(tl.float32)
    x = tl.clamp(x, -1e12, 1e12)  # so that squares are finite
    logits = bias + tl.sum((linear + quadratic * x[None, :]) * x[None, :], 1)
    likelihoods = tl.exp2(logits - tl.max(logits, 0))
    gamma = likelihoods / tl.sum(likelihoods, 0)
    if CORRELATE:
        delta = tl.where(tl.arange(0, CP) < C, gamma - 1.0 / C, 0.0)
        gamma = delta * tl.rsqrt(tl.sum(delta * delta, 0) + CORRELATION_EPS / C)
    return gamma


@triton.jit(do_not_specialize=["N", "M", "kv_groups"])
def decode_kernel(
    Q, K, V, Means, RawVariances, Priors, W, LA, S, Z, Slots, Output, Normalizer, NewS, NewZ,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_wb, stride_wh, stride_wn, stride_ab, stride_ah, stride_an, stride_ob, stride_oh, stride_on,
    stride_ss, stride_zs, N, M, C, D, DV, kv_groups, eps, variance_floor,
    R: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, CORRELATE: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr, NORMALIZE: tl.constexpr, OUTPUT_NORMALIZER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    v, mixture = program % NV, (program // NV) % M
    batch = (program // NV // M).to(tl.int64)
    components, columns = tl.arange(0, CP), tl.arange(0, DP)
    value_columns = v * BV + tl.arange(0, BV)
    exists, has_value = components < C, value_columns < DV
    offsets = components[:, None] * D + columns[None, :]
    mask = exists[:, None] & (columns < D)[None, :]
    of_mixture = mixture * C * D
    linear, quadratic, bias = load_centred(
        Means + of_mixture, RawVariances + of_mixture, offsets, mask, variance_floor, C
    )
    bias += log_priors(Priors + mixture * C, components, C, CP)
    bias = tl.where(exists, bias * LOG2E, -1e30)

    slab = batch * M + mixture
    of_state = components[:, None] * DV + value_columns[None, :]
    in_state = exists[:, None] & has_value[None, :]
    of_S, of_z = slab * C * DV, slab * C
    if HAS_SLOTS:
        slot = tl.load(Slots + batch).to(tl.int64)
        of_S, of_z = slot * stride_ss + mixture * C * DV, slot * stride_zs + mixture * C
    if HAS_STATE:
        state = tl.load(S + of_S + of_state, mask=in_state, other=0.0).to(tl.float32)
        norm = tl.load(Z + of_z + components, mask=exists, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([CP, BV], tl.float32)
        norm = tl.zeros([CP], tl.float32)

    kv_head = (mixture // kv_groups).to(tl.int64)
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    for token in range(N):
        written = route_of(K + token * stride_kn, columns, C, D, linear, quadratic, bias, CP, CORRELATE)
        value = tl.load(V + token * stride_vn + value_columns, mask=has_value, other=0.0).to(tl.float32)
        if HAS_DECAY:
            decay = tl.load(LA + batch * stride_ab + mixture * stride_ah + token * stride_an).to(tl.float32)
            decay = tl.exp2(decay * LOG2E)
            state *= decay
            norm *= decay
        if HAS_WEIGHT:
            weight = tl.load(W + batch * stride_wb + mixture * stride_wh + token * stride_wn).to(tl.float32)
            written *= weight
            value = tl.where(weight > 0, value, 0.0)  # padding may hold anything
        state += written[:, None] * value[None, :]
        norm += written
        for r in range(R):
            head = (mixture * R + r).to(tl.int64)
            query = Q + batch * stride_qb + head * stride_qh + token * stride_qn
            gamma = route_of(query, columns, C, D, linear, quadratic, bias, CP, CORRELATE)
            read = tl.sum(gamma[:, None] * state, 0)
            if NORMALIZE:
                denominator = tl.sum(gamma * norm, 0) + eps
                read /= denominator
                if OUTPUT_NORMALIZER:
                    if v == 0:
                        tl.store(Normalizer + (batch * M * R + head) * N + token, denominator)
            to = Output + batch * stride_ob + head * stride_oh + token * stride_on + value_columns
            tl.store(to, rounded(read, Output.dtype.element_ty), mask=has_value)

    tl.store(NewS + of_S + of_state, state, mask=in_state)
    if v == 0:  # in slots, too, not where it was read: the programs of the other values may read it later
        tl.store(NewZ + slab * C + components, norm, mask=exists)


torch.library.define(
    "gma_hf::fused_decoding",
    f"({INPUTS}, Tensor? S, Tensor? z, float? eps, float variance_floor, bool output_normalizer, "
    "bool correlate) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::fused_decoding", ("cpu", "cuda"))
@on_one_device
@on_its_device
def fused_decoding(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, eps, variance_floor,
    output_normalizer, correlate,
):  # fmt: skip
    """Output, D (of size 0 unless output_normalizer), S, z."""
    output, (new_S, new_z) = empty_output(query, value), empty_state(query, means, value)
    normalizer = empty_normalizer(query, output_normalizer)
    state = (None, None) if S is None else (S.contiguous(), z.contiguous())
    launch(
        query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, *state, None, output,
        normalizer if output_normalizer else None, new_S, new_z, eps, variance_floor, correlate,
    )  # fmt: skip
    return output, normalizer, new_S, new_z


def launch(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, slots, output, normalizer,
    new_S, new_z, eps, variance_floor, correlate,
) -> None:  # fmt: skip
    """One launch of the kernel, with outputs that are allocated already."""
    batch, query_heads, length, dim = query.shape
    (mixtures, components, _), value_dim = means.shape, value.shape[-1]
    query, key, value = row_contiguous(query), row_contiguous(key), row_contiguous(value)
    CP, DP, block, blocks = sizes(components, dim, value_dim)
    decode_kernel[(batch * mixtures * blocks,)](
        query, key, value, means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(), write_weight,
        log_decay, S, z, slots, output, normalizer, new_S, new_z,
        *strides(query), *strides(key), *strides(value), *strides(write_weight), *strides(log_decay),
        *output.stride()[:3], *((0, 0) if slots is None else (S.stride(0), z.stride(0))), length, mixtures, components,
        dim, value_dim, mixtures // key.shape[1], 0.0 if eps is None else eps, variance_floor,
        R=query_heads // mixtures, CP=CP, DP=DP, BV=block, NV=blocks, HAS_WEIGHT=write_weight is not None,
        HAS_DECAY=log_decay is not None, CORRELATE=correlate, HAS_STATE=S is not None, HAS_SLOTS=slots is not None,
        NORMALIZE=eps is not None, OUTPUT_NORMALIZER=normalizer is not None, num_warps=8 if CP * DP > 4096 else 4,
    )  # fmt: skip


@functools.cache
def sizes(components: int, dim: int, value_dim: int) -> tuple[int, int, int, int]:
    """CP, DP, BV and NV."""
    block = min(padded(value_dim), VALUE_BLOCK)
    return padded(components), padded(dim), block, cdiv(value_dim, block)


def empty_state(query: Tensor, means: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """S [B, M, C, DV] and z [B, M, C]."""
    batch, (mixtures, components, _) = query.shape[0], means.shape
    return (
        query.new_empty(batch, mixtures, components, value.shape[-1], dtype=torch.float32),
        query.new_empty(batch, mixtures, components, dtype=torch.float32),
    )


@torch.library.register_fake("gma_hf::fused_decoding")
@on_one_device
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, eps, variance_floor,
    output_normalizer, correlate,
):  # fmt: skip
    return empty_output(query, value), empty_normalizer(query, output_normalizer), *empty_state(query, means, value)


vmapped_by_loops("fused_decoding")


torch.library.define(
    "gma_hf::fused_decoding_in_slots",
    f"({INPUTS}, Tensor(a!) S, Tensor(b!) z, Tensor slots, float? eps, float variance_floor, "
    "bool output_normalizer, bool correlate) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::fused_decoding_in_slots", ("cpu", "cuda"))
@on_one_device
@on_its_device
def fused_decoding_in_slots(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, slots, eps, variance_floor,
    output_normalizer, correlate,
):  # fmt: skip
    """
    Output, D (of size 0 unless output_normalizer). S and z of the slots are written in place. The numbers of one slot are
    contiguous.
    """
    output, slots = empty_output(query, value), slots.contiguous()
    normalizer = empty_normalizer(query, output_normalizer)
    new_z = z.new_empty(len(slots), *z.shape[1:])
    launch(
        query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, slots, output,
        normalizer if output_normalizer else None, S, new_z, eps, variance_floor, correlate,
    )  # fmt: skip
    if not correlate:  # correlated routes have no z
        z.index_copy_(0, slots.long(), new_z)
    return output, normalizer


@torch.library.register_fake("gma_hf::fused_decoding_in_slots")
@on_one_device
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, slots, eps, variance_floor,
    output_normalizer, correlate,
):  # fmt: skip
    return empty_output(query, value), empty_normalizer(query, output_normalizer)


torch.library.define(
    "gma_hf::fused_packed_attention",
    f"({INPUTS}, Tensor(a!) S, Tensor(b!) z, Tensor starts, Tensor? slots, float? eps, float variance_floor, "
    "bool output_normalizer, bool correlate) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::fused_packed_attention", ("cpu", "cuda"))
@on_one_device
@on_its_device
def fused_packed_attention(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, starts, slots, eps,
    variance_floor, output_normalizer, correlate,
):  # fmt: skip
    """
    Output, and D (of size 0 unless output_normalizer). S and z are written in place. Without slots, the states lie in the
    order of the sequences, row by row. The numbers of one state are contiguous.
    """
    (batch, query_heads, length, dim), sequences = query.shape, starts.shape[1] - 1
    (mixtures, components, _), value_dim = means.shape, value.shape[-1]
    query, key, value = row_contiguous(query), row_contiguous(key), row_contiguous(value)
    plan = plan_of(query, value, means)
    weights, bias = compute_coefficients(plan, means, raw_variances, prior_logits, variance_floor)
    output, normalizer = empty_output(query, value), empty_normalizer(query, output_normalizer)
    fused_read_kernel[(batch * sequences * mixtures,)](
        query, key, value, output, normalizer if output_normalizer else None, None, write_weight, log_decay, weights, bias,
        S, None, None, None, None, None, starts.contiguous(), slots, z,
        *strides(query), *strides(key), *strides(value), *strides(output), *strides(write_weight), *strides(log_decay),
        S.stride(0), z.stride(0), length, components, dim, value_dim, mixtures, 1, 0, mixtures // key.shape[1], sequences,
        eps or 0.0,
        R=query_heads // mixtures, CAUSAL=True, ONE_PASS=True, LAST=True, HAS_STATE=True, STRICT=False,
        NORMALIZE=eps is not None, OUTPUT_NORMALIZER=output_normalizer, SAVE=False, PACKED=True, HAS_SLOTS=slots is not None,
        **fused_constants(plan, dim, value_dim, write_weight, log_decay, not correlate, correlate),
    )  # fmt: skip
    return output, normalizer


@torch.library.register_fake("gma_hf::fused_packed_attention")
@on_one_device
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, starts, slots, eps,
    variance_floor, output_normalizer, correlate,
):  # fmt: skip
    return empty_output(query, value), empty_normalizer(query, output_normalizer)


def is_small_enough(query: Tensor, value: Tensor, means: Tensor) -> bool:
    """Whether one tile holds the state of a mixture."""
    return plan_of(query, value, means).fused
