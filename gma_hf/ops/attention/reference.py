# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The definition, computed as matrices. The cost is quadratic in the length: for tests and short sequences.

    P_ij = gamma^Q_i . gamma^K_j  w_j  exp(sum_{j < l <= i} log a_l)        j <= i if causal
    D_i  = sum_j P_ij + d_i gamma^Q_i z_0 + eps
    o_i  = (sum_j P_ij v_j + d_i gamma^Q_i S_0) / D_i
    S_N  = sum_j exp(sum_{j < l <= N} log a_l) w_j gamma^K_j v_j^T + d_N S_0,     z_N likewise with v_j = 1
    d_i  = exp(sum_{l <= i} log a_l)

With correlation, rho replaces gamma, and the read is not normalised.

ONNX has the standard operators of PyTorch only. For ONNX, `standard_attention` computes the same; bidirectional calls take
linear time: S = S_0 + sum_j w_j gamma^K_j v_j^T, z likewise with v_j = 1, o_i = gamma^Q_i S / (gamma^Q_i z + eps).

query [B, Hq, Nq, d], key [B, Hk, N, d], value [B, Hk, N, dv], mixtures M -> output [B, Hq, Nq, dv],
S [B, M, C, dv], z [B, M, C], D [B, Hq, Nq].
"""

import torch
from torch import Tensor

from ..dispatch import Way
from .call import AFFINITY, WAYS, AttentionCall, AttentionResult
from .mixture import plus_eps, repeat_heads, responsibilities, unwritten_as_zero


def segment_sums(x: Tensor) -> Tensor:
    """
    Sums over segments, [..., length] -> [..., length, length]: entry (i, j) = x_{j+1} + ... + x_i for j <= i.

    Entries above the diagonal are 0. Each column is a cumulative sum that starts after j, and not a difference of two
    cumulative sums. So the sums are exact for x = -inf, and short segments keep their digits after large ones.
    """
    length = x.shape[-1]
    below = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    return x.unsqueeze(-1).masked_fill(~below, 0.0).cumsum(dim=-2)


def decay_matrix(log_decay: Tensor, strict: bool = False) -> Tensor:
    """exp(sum_{j < l <= i} log a_l) for j <= i (j < i if strict), else 0: [..., length] -> [..., length, length]."""
    return segment_sums(log_decay).exp().tril(-1 if strict else 0)


def pair_weights(call: AttentionCall) -> Tensor:
    """P of the equations at the top: [batch, query_heads, query_length, key_length], before normalisation."""
    coefficients = call.coefficients()
    query_heads = call.query.shape[1]
    mixtures = call.means.shape[0]
    gamma_query = responsibilities(call.query, coefficients, call.correlate)
    gamma_query = gamma_query.unflatten(1, (mixtures, query_heads // mixtures))
    key = unwritten_as_zero(repeat_heads(call.key, mixtures), call.write_weight)
    gamma_key = responsibilities(key, coefficients, call.correlate)
    if call.write_weight is not None:
        gamma_key = gamma_key * call.write_weight.to(gamma_key.dtype).unsqueeze(-1)
    pairs = gamma_query @ gamma_key.transpose(-1, -2).unsqueeze(2)
    if call.causal:
        pairs = pairs * decay_matrix(log_decay_or_zero(call), call.strict).unsqueeze(2)
    return pairs.flatten(1, 2)


def log_decay_or_zero(call: AttentionCall) -> Tensor:
    """log a [batch, 1 or mixtures, length] in the precision of the state; 0 without forgetting."""
    if call.log_decay is None:
        return call.key.new_zeros(call.key.shape[0], 1, call.key.shape[2], dtype=call.state_dtype)
    return call.log_decay.to(call.state_dtype)


def reference_attention(call: AttentionCall) -> AttentionResult:
    """Compute the call with the matrices of the equations at the top."""
    dtype, mixtures = call.state_dtype, call.means.shape[0]
    key, value = (
        unwritten_as_zero(repeat_heads(x, mixtures), call.write_weight) for x in (call.key, call.value.to(dtype))
    )
    pairs = pair_weights(call).unflatten(1, (mixtures, -1))  # [B, M, R, Nq, N]
    numerator = pairs @ value.unsqueeze(2)
    denominator = pairs.sum(dim=-1, keepdim=True)

    coefficients = call.coefficients()
    written = responsibilities(key, coefficients, call.correlate)
    if call.write_weight is not None:
        written = written * call.write_weight.to(dtype).unsqueeze(-1)
    log_decay = log_decay_or_zero(call)
    from_start = log_decay.cumsum(dim=-1).exp()  # d_i
    if call.causal:
        # sum_{j < l <= N}: the reversed cumulative sum that leaves out j itself.
        to_end = segment_sums(log_decay)[..., -1:, :].squeeze(-2).exp() if log_decay.shape[-1] else log_decay
        written = written * to_end.unsqueeze(-1)
    S = written.transpose(-1, -2) @ value
    z = written.sum(dim=-2)
    if call.initial_state is not None:
        S_0, z_0 = (part.to(dtype) for part in call.initial_state)
        gamma_query = responsibilities(call.query, coefficients, call.correlate).unflatten(1, (mixtures, -1))
        if call.causal:
            gamma_query = gamma_query * from_start[:, :, None, :, None]
            remaining = from_start[..., -1:].unsqueeze(-1) if log_decay.shape[-1] else 1.0
        else:
            remaining = 1.0
        numerator = numerator + gamma_query @ S_0.unsqueeze(2)
        denominator = denominator + gamma_query @ z_0[:, :, None, :, None]
        S = S + S_0 * remaining
        z = z + (z_0.unsqueeze(-1) * remaining).squeeze(-1)
    denominator = plus_eps(denominator, call.eps)
    output = numerator / denominator if call.normalize else numerator
    normalizer = denominator.flatten(1, 2).squeeze(-1) if call.output_normalizer else None
    return AttentionResult(output.flatten(1, 2).to(call.value.dtype), (S, z), normalizer)


def standard_attention(call: AttentionCall) -> AttentionResult:
    """Compute the call with standard operators: no custom operator, and no write in place."""
    if call.causal:
        return reference_attention(call)
    dtype, mixtures, coefficients = call.state_dtype, call.means.shape[0], call.coefficients()
    key, value = (
        unwritten_as_zero(repeat_heads(x, mixtures), call.write_weight) for x in (call.key, call.value.to(dtype))
    )
    written = responsibilities(key, coefficients, call.correlate)  # [B, M, N, C]
    if call.write_weight is not None:
        written = written * call.write_weight.to(dtype).unsqueeze(-1)
    S, z = written.transpose(-1, -2) @ value, written.sum(dim=-2)
    if call.initial_state is not None:
        S, z = S + call.initial_state[0].to(dtype), z + call.initial_state[1].to(dtype)
    gamma_query = responsibilities(call.query, coefficients, call.correlate).unflatten(1, (mixtures, -1))
    output = gamma_query @ S.unsqueeze(2)  # [B, M, Hq / M, Nq, dv]
    normalizer = None
    if call.normalize:
        denominator = plus_eps(gamma_query @ z[:, :, None, :, None], call.eps)
        output = output / denominator
        normalizer = denominator.flatten(1, 2).squeeze(-1) if call.output_normalizer else None
    return AttentionResult(output.flatten(1, 2).to(call.value.dtype), (S, z), normalizer)


WAYS.register(Way("reference", run=reference_attention))
AFFINITY.register(Way("reference", run=pair_weights))
