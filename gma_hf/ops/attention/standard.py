# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention by the standard operators of PyTorch alone, for ONNX. No operator of our own, nothing written in place.

    bidirectional:  S = S_0 + sum_j w_j gamma^K_j v_j^T,    z likewise with v_j = 1,    o_i = gamma^Q_i S / (gamma^Q_i z + eps)
    causal:         the matrices of `reference`, quadratic in the length

query [B, Hq, Nq, d], key [B, Hk, N, d], value [B, Hk, N, dv], mixtures M -> output [B, Hq, Nq, dv],
S [B, M, C, dv], z [B, M, C], denominators [B, Hq, Nq]. With correlation, rho stands for gamma.
"""

from .call import AttentionCall, AttentionResult
from .mixture import repeat_heads, responsibilities, unwritten_as_zero
from .reference import reference_attention


def standard_attention(call: AttentionCall) -> AttentionResult:
    """Evaluate the call with the equations of this file's opening."""
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
        denominator = gamma_query @ z[:, :, None, :, None] + call.eps
        output = output / denominator
        normalizer = denominator.flatten(1, 2).squeeze(-1) if call.output_normalizer else None
    return AttentionResult(output.flatten(1, 2).to(call.value.dtype), (S, z), normalizer)
