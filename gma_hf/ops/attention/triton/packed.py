# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Packed sequences with a state each: one launch runs all sequences and heads of a layer, for inference.

A program has one sequence and one mixture, and carries the state from chunk to chunk, as `fused_outputs` describes. Tokens are
read where they are in their row. States are read where they are in their slots, and the last states replace them.

query [B, HQ, N, D], key [B, HK, N, D], value [B, HK, N, DV], mixtures M, starts [B, s + 1], S [slots, M, C, DV],
z [slots, M, C], slots [B * s] -> output [B, HQ, N, DV], if requested the denominators D [B, HQ, N] in float32.
"""

import torch
from torch import Tensor

from ...operators import on_one_device
from .fused_outputs import fused_read_kernel
from .launching import empty_output, on_its_device, row_contiguous, strides
from .operators import INPUTS, empty_normalizer
from .passes import compute_coefficients, fused_constants, plan_of


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
