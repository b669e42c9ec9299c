# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Linear time for any length: pair weights inside chunks of tokens, states between the chunks.

    causal:         o_i = (sum_{j in chunk, j <= i} P_ij v_j + e_i gamma^Q_i S_n) / (the same with v_j = 1, z_n; + eps)
    bidirectional:  o_i = gamma^Q_i S / (gamma^Q_i z + eps)

S_n, z_n is the state before the chunk (`causal`). S, z is the state after all keys (`bidirectional`). With correlation, rho
replaces gamma.

query [B, Hq, Nq, d], key [B, Hk, N, d], value [B, Hk, N, dv], mixtures M -> output [B, Hq, Nq, dv],
S [B, M, C, dv], z [B, M, C], denominators [B, Hq, Nq].
"""

from ....compat import is_exporting_to_onnx
from ...dispatch import Way, not_in_forward_mode
from ..call import WAYS, AttentionCall, AttentionResult
from ..reference import standard_attention
from .bidirectional import ReadState, WriteState
from .causal_operators import CausalChunks


def chunked_attention(call: AttentionCall) -> AttentionResult:
    """Compute the call chunk by chunk. A program for ONNX has no chunks, and uses standard operators."""
    if is_exporting_to_onnx():
        return standard_attention(call)
    dtype, mixtures = call.state_dtype, call.means.shape[0]
    coefficients = call.coefficients()
    if call.initial_state is None:
        shape = (call.query.shape[0], mixtures, call.means.shape[1])
        S = call.value.new_zeros(*shape, call.value.shape[-1], dtype=dtype)
        z = call.value.new_zeros(shape, dtype=dtype)
    else:
        S, z = (part.to(dtype) for part in call.initial_state)
    # The mixtures lead inside, so that one matrix product per mixture sees the tokens of the whole batch.
    S, z = S.transpose(0, 1), z.transpose(0, 1)
    eps = call.eps if call.normalize else None
    if call.causal:
        output, normalizer, S, z, *_ = CausalChunks.apply(
            call.query, call.key, call.value, *coefficients, call.write_weight, call.log_decay, S, z, eps, call.strict,
            call.output_normalizer, call.correlate,
        )  # fmt: skip
    else:
        S, z = WriteState.apply(call.key, call.value, *coefficients, call.write_weight, S, z, call.correlate)
        output, normalizer = ReadState.apply(
            call.query, *coefficients, S, z, eps, call.value.dtype, call.output_normalizer, call.correlate
        )
    state = (S.transpose(0, 1), z.transpose(0, 1))
    return AttentionResult(output, state, normalizer if call.output_normalizer else None)


WAYS.register(Way("chunked", not_in_forward_mode, run=chunked_attention))
