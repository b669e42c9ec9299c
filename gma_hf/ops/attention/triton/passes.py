# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The passes of a call, each with one or a few launches of kernels: coefficients, responsibilities, states of chunks, and
reads. Shapes as in `operators`, which combines the passes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .coefficients import coefficients_kernel
from .fused_outputs import fused_read_kernel, write_kernel
from .launching import strides
from .outputs import read_kernel
from .plan import PRECISION, Plan, cdiv, make_plan, segment_length
from .responsibilities import responsibilities_kernel
from .states import scan_kernel, states_kernel


TILES = 4  # tiles of tokens that a program computes the responsibilities of, with the same coefficients


def plan_of(query: Tensor, value: Tensor, means: Tensor) -> Plan:
    """The plan of a call."""
    mixtures, components, dim = means.shape
    return make_plan(query.dtype, int(components), int(dim), int(value.shape[-1]), int(query.shape[1] // mixtures))


def compute_coefficients(plan: Plan, means, raw_variances, prior_logits, floor: float) -> tuple[Tensor, Tensor]:
    """Run `coefficients_kernel`."""
    mixtures, components, dim = means.shape
    dtype = torch.float32 if plan.exact else torch.bfloat16
    weights = means.new_empty(mixtures, 2 if plan.exact else 4, plan.CP, plan.DP, dtype=dtype)
    bias = means.new_empty(mixtures, plan.CP, dtype=torch.float32)
    coefficients_kernel[(mixtures,)](
        means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(), weights, bias,
        floor, components, dim, CP=plan.CP, DP=plan.DP, BD=min(plan.BD, 4096 // plan.CP), EXACT=plan.exact,
    )  # fmt: skip
    return weights, bias


def compute_responsibilities(
    plan: Plan, query, key, weights, bias, components: int, gamma_query: Tensor, gamma_key: Tensor, correlate: bool,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """Fill gamma_query [B, HQ, NQ, CP], gamma_key [B, M, NK, CP] and, if given, `lengths` [B, HQ, NQ] and [B, M, NK]."""
    batch, query_heads, query_length, dim = query.shape
    mixtures, key_length = gamma_key.shape[1], gamma_key.shape[2]
    rows = TILES * plan.rows
    query_programs = batch * query_heads * cdiv(query_length, rows)
    responsibilities_kernel[(query_programs + batch * mixtures * cdiv(key_length, rows),)](
        query, key, weights, bias, gamma_query, gamma_key, *lengths,
        *strides(query), *strides(key), *strides(gamma_query), *strides(gamma_key),
        query_length, key_length, components, dim, mixtures, query_programs, mixtures // key.shape[1],
        R=query_heads // mixtures, T=plan.rows, TILES=TILES, CP=plan.CP, DP=plan.DP, BD=plan.BR, EVEN_D=dim == plan.DP,
        CORRELATE=correlate, SAVE=lengths[0] is not None, EXACT=plan.exact, PRECISION=PRECISION, **plan.responsibilities,
    )  # fmt: skip


def scan(states: Tensor, decays: Tensor, first: Tensor | None, last: Tensor, has_decay: bool, reverse: bool) -> None:
    """Run `scan_kernel` in place on states [B * M, segments, size]; fill `last`."""
    slabs, segments, size = states.shape
    block = 128
    scan_kernel[(slabs, cdiv(size, block))](
        states, decays, first, last, segments, size,
        BLOCK=block, ROWS=16, REVERSE=reverse, HAS_DECAY=has_decay, HAS_FIRST=first is not None, num_warps=1,
    )  # fmt: skip


class States(NamedTuple):
    """The result of `states`."""

    chunks: Tensor | None  # of a causal call, [B * M, chunks, CP, DVP], and their norms and scales
    norms: Tensor | None
    scales: Tensor | None
    largest: Tensor  # [B * heads, NV, chunks], of the values
    decays: Tensor | None  # backwards [B * M, 2, N], running sums of log-decays and resets within the chunks
    last: Tensor | None  # [B * M, CP * DVP + CP], if asked for


def compute_states(
    plan: Plan, gamma, y, output, rd, grad_normalizer, write_weight, log_decay, mixtures, repeats, first,
    reverse: bool, causal: bool, has_z: bool, need_last: bool,
) -> States:  # fmt: skip
    """Run `states_kernel` in one pass, or, if sequences and heads are few, in two passes with `scan_kernel` between them."""
    batch, heads, length, _ = gamma.shape
    value_dim = y.shape[-1]
    slabs, chunks = batch * mixtures, cdiv(length, plan.T)
    per_segment = segment_length(plan, slabs, chunks, y.device)
    segments = cdiv(chunks, per_segment)

    def new(*shape, dtype=torch.float32):
        return y.new_empty(shape, dtype=dtype)

    largest = new(batch * heads, plan.NV, chunks)
    sums_of_decays = new(slabs, 2, length) if reverse and log_decay is not None else None
    states = norms = scales = None
    if causal:
        states = new(slabs, chunks, plan.CP, plan.DVP, dtype=plan.gamma_dtype)
        norms, scales = new(slabs if has_z else 0, chunks, plan.CP), new(slabs, plan.NV, chunks)
    last = new(slabs, plan.state_size) if need_last or segments > 1 or not causal else None
    blocks = cdiv(plan.CP, plan.BC)

    def launch(first, sums, decays, store_chunks: bool):
        states_kernel[(slabs * plan.NV * blocks * segments,)](
            gamma, y, output, rd, grad_normalizer, write_weight, log_decay, first, sums, decays, states, norms, scales, largest,
            sums_of_decays, *strides(gamma), *strides(y), *strides(output), *strides(write_weight), *strides(log_decay),
            length, value_dim, mixtures, segments, per_segment, mixtures // y.shape[1] if not reverse else 1,
            R=repeats, T=plan.T, CP=plan.CP, BC=plan.BC, BV=plan.BV, NV=plan.NV, EVEN_V=value_dim == plan.DVP,
            REVERSE=reverse, CHUNKS=store_chunks, HAS_FIRST=first is not None, LAST=sums is not None,
            HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None, HAS_Z=has_z, NORMALIZE=rd is not None,
            HAS_GRAD_NORMALIZER=grad_normalizer is not None, EXACT=plan.exact, PRECISION=PRECISION, **plan.states,
        )  # fmt: skip

    if causal and segments == 1:
        launch(first, last, None, True)
    else:
        sums, decays = new(slabs, segments, plan.state_size), new(slabs, segments)
        launch(None, sums, decays, False)
        scan(sums, decays, first, last, log_decay is not None, reverse)
        if causal:
            launch(sums, None, None, True)
    return States(states, norms, scales, largest, sums_of_decays, last)


def to_slabs(plan: Plan, S: Tensor, z: Tensor) -> Tensor:
    """S [B, M, C, DV], z [B, M, C] -> [B * M, CP * DVP + CP]."""
    batch, mixtures, components, value_dim = S.shape
    slabs = S.new_zeros(batch, mixtures, plan.state_size, dtype=torch.float32)
    norms = plan.CP * plan.DVP
    slabs[..., :norms].unflatten(-1, (plan.CP, plan.DVP))[..., :components, :value_dim] = S
    slabs[..., norms:][..., :components] = z
    return slabs.flatten(0, 1)


def from_slabs(plan: Plan, slabs: Tensor, batch: int, components: int, dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of `to_slabs`: always a copy, so that nothing keeps the padding in memory."""
    slabs, norms = slabs.unflatten(0, (batch, -1)), plan.CP * plan.DVP
    S = slabs[..., :norms].unflatten(-1, (plan.CP, plan.DVP))[..., :components, :dim]
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (S, slabs[..., norms:][..., :components]))


def read_from_memory(
    plan, query, key, value, weights, bias, write_weight, log_decay, components, first, output, normalizer, rd,
    causal, strict, eps, save, final_state, correlate,
) -> States:  # fmt: skip
    """Fill output, normalizer and rd, with responsibilities in memory."""
    batch, query_heads, length, _ = query.shape
    mixtures, normalize = weights.shape[0], eps is not None
    gamma_query = query.new_empty(batch, query_heads, length, plan.CP, dtype=plan.gamma_dtype)
    gamma_key = query.new_empty(batch, mixtures, key.shape[2], plan.CP, dtype=plan.gamma_dtype)
    compute_responsibilities(plan, query, key, weights, bias, components, gamma_query, gamma_key, correlate)
    states = compute_states(
        plan, gamma_key, value, None, None, None, write_weight, log_decay, mixtures, 1, first,
        False, causal, normalize or final_state, final_state,
    )  # fmt: skip
    read_kernel[(batch * mixtures * cdiv(length, plan.T),)](
        gamma_query, gamma_key, value, output, normalizer, rd, write_weight, log_decay,
        states.chunks if causal else states.last, states.norms, states.scales, states.largest,
        *strides(gamma_query), *strides(gamma_key), *strides(value), *strides(output), *strides(write_weight),
        *strides(log_decay), length, value.shape[-1], mixtures, mixtures // key.shape[1], eps or 0.0,
        R=query_heads // mixtures, T=plan.T, CP=plan.CP, BV=plan.BV, NV=plan.NV, EVEN_V=value.shape[-1] == plan.DVP,
        CAUSAL=causal, STRICT=strict, HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None,
        NORMALIZE=normalize, OUTPUT_NORMALIZER=normalizer is not None, SAVE=save, EXACT=plan.exact, PRECISION=PRECISION,
        **plan.read,
    )  # fmt: skip
    return states


def read_fused(
    plan, query, key, value, weights, bias, write_weight, log_decay, components, first, output, normalizer, rd,
    causal, strict, eps, save, final_state, correlate,
) -> States:  # fmt: skip
    """Fill output, normalizer and rd, with responsibilities that stay on the chip."""
    batch, query_heads, length, dim = query.shape
    mixtures, normalize, value_dim, key_length = weights.shape[0], eps is not None, value.shape[-1], key.shape[2]
    slabs, chunks, key_chunks = batch * mixtures, cdiv(length, plan.T), cdiv(key_length, plan.T)
    has_z = normalize or final_state
    new = bias.new_empty
    one_pass = causal and segment_length(plan, slabs, chunks, query.device) == chunks
    last = new(slabs, plan.state_size) if final_state or not one_pass else None
    largest = new(slabs, 1, key_chunks) if save or not one_pass else None
    kept = norms = scales = None
    if save and causal:
        kept = new(slabs, chunks, plan.CP, plan.BV, dtype=plan.gamma_dtype)
        norms, scales = new(slabs if has_z else 0, chunks, plan.CP), new(slabs, 1, chunks)
    constants = fused_constants(plan, dim, value_dim, write_weight, log_decay, has_z, correlate)
    states, per_segment = first, chunks
    if not one_pass:
        per_key_segment = segment_length(plan, slabs, key_chunks, query.device)
        segments = cdiv(key_chunks, per_key_segment)
        states, decays = new(slabs, segments, plan.state_size), new(slabs, segments)
        write_kernel[(slabs * segments,)](
            key, value, write_weight, log_decay, weights, bias, states, decays, largest,
            *strides(key), *strides(value), *strides(write_weight), *strides(log_decay),
            key_length, components, dim, value_dim, mixtures, segments, per_key_segment, mixtures // key.shape[1], **constants,
        )  # fmt: skip
        scan(states, decays, first, last, log_decay is not None, False)
        per_segment = per_key_segment if causal else segment_length(plan, slabs, chunks, query.device)
        states = states if causal else last
    segments = cdiv(chunks, per_segment)
    fused_read_kernel[(slabs * segments,)](
        query, key, value, output, normalizer, rd, write_weight, log_decay, weights, bias, states, last,
        largest, kept, norms, scales, None, None, None,
        *strides(query), *strides(key), *strides(value), *strides(output), *strides(write_weight), *strides(log_decay),
        0 if states is None else states.stride(0), 0, length, components, dim, value_dim, mixtures, segments, per_segment,
        mixtures // key.shape[1], 1, eps or 0.0,
        R=query_heads // mixtures, CAUSAL=causal, ONE_PASS=one_pass, LAST=one_pass and final_state,
        HAS_STATE=states is not None, STRICT=strict, NORMALIZE=normalize,
        OUTPUT_NORMALIZER=normalizer is not None, SAVE=save, PACKED=False, HAS_SLOTS=False, **constants,
    )  # fmt: skip
    return States(kept, norms, scales, largest, None, last)


def fused_constants(plan, dim, value_dim, write_weight, log_decay, has_z: bool, correlate: bool) -> dict:
    """The constants of `write_kernel` and `fused_read_kernel`."""
    return {
        "T": plan.T, "CP": plan.CP, "DP": plan.DP, "BD": plan.BD, "BV": plan.BV, "EVEN_D": dim == plan.DP,
        "EVEN_V": value_dim == plan.BV, "HAS_WEIGHT": write_weight is not None, "HAS_DECAY": log_decay is not None,
        "HAS_Z": has_z, "CORRELATE": correlate, "EXACT": plan.exact, "PRECISION": PRECISION, **plan.fused_launch,
    }  # fmt: skip
