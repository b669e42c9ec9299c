# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The recurrence, one token at a time from a state: the form for decoding.

    S_t = a_t S_{t-1} + w_t gamma^K_t v_t^T
    z_t = a_t z_{t-1} + w_t gamma^K_t
    o_t = gamma^Q_t S_t / D_t, D_t = gamma^Q_t z_t + eps          or gamma^Q_t S_t when the read is not normalised

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], mixtures M -> output [B, Hq, N, dv],
S [B, M, C, dv], z [B, M, C], D [B, Hq, N].
"""

import torch

from ..dispatch import AttentionCall, AttentionResult, register_backend
from .mixture import repeat_heads, responsibilities


SHORT = 8  # tokens: up to here stepping beats the set-up of chunks


def recurrent_attention(call: AttentionCall) -> AttentionResult:
    """Evaluate a causal call token by token."""
    dtype, mixtures = call.state_dtype, call.means.shape[0]
    coefficients = call.coefficients()
    gamma_query = responsibilities(call.query, coefficients).unflatten(1, (mixtures, -1))  # [B, M, Hq / M, N, C]
    gamma_key = responsibilities(repeat_heads(call.key, mixtures), coefficients)  # [B, M, N, C]
    value = repeat_heads(call.value.to(dtype), mixtures)
    if call.write_weight is not None:
        gamma_key = gamma_key * call.write_weight.to(dtype).unsqueeze(-1)
    decay = None if call.log_decay is None else call.log_decay.to(dtype).exp()[..., None, None]

    batch, _, length, components = gamma_key.shape
    if call.initial_state is None:
        S = value.new_zeros(batch, mixtures, components, value.shape[-1])
        z = value.new_zeros(batch, mixtures, components, 1)
    else:
        S, z = call.initial_state[0].to(dtype), call.initial_state[1].to(dtype).unsqueeze(-1)

    outputs, normalizers = [], []
    for t in range(length):
        write = gamma_key[:, :, t].unsqueeze(-1)  # [B, M, C, 1]
        if decay is not None:
            S, z = S * decay[:, :, t], z * decay[:, :, t]
        S = S + write * value[:, :, t].unsqueeze(-2)
        z = z + write
        read = gamma_query[:, :, :, t]  # [B, M, Hq / M, C]
        output = read @ S
        if call.normalize:
            normalizers.append(read @ z + call.eps)
            output = output / normalizers[-1]
        outputs.append(output)
    output = torch.stack(outputs, dim=3) if outputs else gamma_query @ S.unsqueeze(2)
    normalizer = None
    if call.output_normalizer:
        normalizer = torch.stack(normalizers, dim=3) if normalizers else gamma_query @ z.unsqueeze(2)
        normalizer = normalizer.flatten(1, 2).squeeze(-1)
    return AttentionResult(output.flatten(1, 2).to(call.value.dtype), (S, z.squeeze(-1)), normalizer)


def supports(call: AttentionCall) -> str | None:
    if not call.causal or call.strict:
        return "the recurrence is causal, and position i reads what positions j <= i wrote."
    return None


def priority(call: AttentionCall) -> int:
    # A length that is still open (torch.export) is no int, and must not be decided on
    length = call.key.shape[2]
    return 20 if isinstance(length, int) and length <= SHORT else 0


register_backend("recurrent", recurrent_attention, supports=supports, priority=priority)
