# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Linear time in fused GPU kernels, which keep the intermediate results of a chunk on the chip.

    causal:         o_i = (sum_{j in chunk, j <= i} P_ij v_j + e_i gamma^Q_i S_n) / (the same with v_j = 1, z_n; + eps)
    bidirectional:  o_i = gamma^Q_i S / (gamma^Q_i z + eps)

These are the equations of `chunked`, computed by the kernels in `triton`. This file decides when the kernels can run, and
imports them when they run.

query [B, Hq, Nq, d], key [B, Hk, N, d], value [B, Hk, N, dv], mixtures M -> output [B, Hq, Nq, dv],
S [B, M, C, dv], z [B, M, C], denominators [B, Hq, Nq].
"""

import torch

from ...compat import is_exporting
from ..dispatch import Way, not_in_forward_mode
from ..triton_support import DTYPES, MAX_DIM, missing
from .call import WAYS, AttentionCall, AttentionResult
from .recurrent import SHORT


MAX_COMPONENTS = 256
MAX_STATE = 64 * 256  # components times dimension that fit into a multiprocessor


def needs_gradients(call: AttentionCall) -> bool:
    if is_exporting():
        # Tensors for a backward pass have the shape of the chunks, which would fix a symbolic length
        return False
    return call.needs_gradients


def is_step(call: AttentionCall) -> bool:
    """Whether the call is a decoding step: a few tokens, without gradients."""
    # A symbolic length (torch.export) is no int, and the graph must not depend on its value
    length = call.key.shape[2]
    is_short = isinstance(length, int) and length <= SHORT
    return is_short and call.causal and not call.strict and not needs_gradients(call)


def fused_attention(call: AttentionCall) -> AttentionResult:
    """Compute the call with the fused kernels."""
    from .triton import decoding, operators  # noqa: F401 (decoding defines an operator)

    S, z = (None, None) if call.initial_state is None else call.initial_state
    tensors = (
        call.query, call.key, call.value, call.means, call.raw_variances, call.prior_logits, call.write_weight,
        call.log_decay, S, z,
    )  # fmt: skip
    eps = call.eps if call.normalize else None
    if is_step(call):
        output, normalizer, S, z = torch.ops.gma_hf.fused_decoding(
            *tensors, eps, call.variance_floor, call.output_normalizer, call.correlate
        )
    else:
        output, normalizer, S, z, *_ = operators.FusedAttention.apply(
            *tensors, call.causal, call.strict, eps, call.variance_floor, needs_gradients(call),
            call.output_final_state, call.output_normalizer, call.correlate,
        )  # fmt: skip
    state = (S, z) if call.output_final_state else None
    return AttentionResult(output, state, normalizer if call.output_normalizer else None)


def cannot_run(call: AttentionCall) -> str | None:
    """Why the kernels cannot run a call, or `None`."""
    dtype = call.query.dtype
    # Float32 values beside bfloat16 queries are rounded to eleven bits, which is more than the queries have
    if dtype not in DTYPES or call.key.dtype != dtype or call.value.dtype not in (dtype, torch.float32):
        return "query, key and value must all be float32, all float16 or all bfloat16 (values may be float32)."
    if call.means.shape[1] > MAX_COMPONENTS:
        return f"there are more than {MAX_COMPONENTS} components."
    if max(call.query.shape[-1], call.value.shape[-1]) > MAX_DIM:
        return f"the routing or value dimension is above {MAX_DIM}."
    if call.means.shape[1] * max(call.query.shape[-1], call.value.shape[-1]) > MAX_STATE:
        return f"components times dimension are above {MAX_STATE}."
    if 0 in (call.query.numel(), call.key.numel(), call.value.numel()):
        return "a tensor is empty."
    return not_in_forward_mode() or missing(call.query.device.type, call.query.device.index)


def suits(call: AttentionCall) -> bool:
    """Whether "auto" takes the kernels: on a GPU. For a few tokens with gradients, the recurrence is faster than chunks."""
    length = call.key.shape[2]
    is_short = isinstance(length, int) and length <= SHORT and call.causal and not call.strict
    return call.query.is_cuda and (not is_short or is_step(call))


WAYS.register(Way("triton", cannot_run, suits, fused_attention))
