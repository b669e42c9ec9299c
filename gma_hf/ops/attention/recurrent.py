# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The recurrence, one token at a time from a state, for decoding.

    S_t = a_t S_{t-1} + w_t gamma^K_t v_t^T
    z_t = a_t z_{t-1} + w_t gamma^K_t
    o_t = gamma^Q_t S_t / D_t, D_t = gamma^Q_t z_t + eps          or gamma^Q_t S_t if the read is not normalised

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], mixtures M -> output [B, Hq, N, dv],
S [B, M, C, dv], z [B, M, C], D [B, Hq, N]. With correlation, rho replaces gamma, and the read is not normalised.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...compat import is_exporting_to_onnx
from ..dispatch import Way
from .call import WAYS, AttentionCall, AttentionResult, State
from .mixture import (
    MAX_DISTANCE,
    MixtureCoefficients,
    correlated,
    mixture_coefficients,
    repeat_heads,
    responsibilities,
    smallest_share,
    unwritten_as_zero,
)


SHORT = 8  # tokens: up to this number, steps are faster than chunks


class StepCoefficients(NamedTuple):
    """
    The mixture as one affine map of [x, x * x]: the values of the parameters that `step` needs, to be kept while they do not
    change.
    """

    centre: Tensor  # [M, 1, d]
    joined: Tensor  # [M, 2 d, C], mu / sigma^2 above -1/2 / sigma^2
    bias: Tensor  # [M, 1, C]


def step_coefficients(coefficients: MixtureCoefficients) -> StepCoefficients:
    """The coefficients of a mixture for `step`."""
    joined = torch.cat([coefficients.linear, coefficients.quadratic], dim=-1).transpose(1, 2).contiguous()
    return StepCoefficients(coefficients.centre, joined, coefficients.bias)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: StepCoefficients,
    *,
    write_weight: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: State | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    output_normalizer: bool = False,
    correlate: bool = False,
    writes_all: bool = False,
) -> AttentionResult:
    """
    One token of the recurrence, without gradients. On a CPU, the number of calls into PyTorch is the cost of a decoding
    step, so nothing is validated. The arguments do not change.

    Args:
        query (`torch.Tensor` of shape `(batch, query_heads, 1, routing_dim)`): queries of the token.
        key (`torch.Tensor` of shape `(batch, key_value_heads, 1, routing_dim)`): keys of the token.
        value (`torch.Tensor` of shape `(batch, key_value_heads, 1, value_dim)`): values of the token.
        coefficients (`StepCoefficients`): the mixtures, in the precision of the state.
        write_weight (`torch.Tensor` of shape `(batch, 1 or mixtures, 1)`, *optional*): by default 1.
        log_decay (`torch.Tensor` of shape `(batch, 1 or mixtures, 1)`, *optional*): by default 0.
        state (`tuple[torch.Tensor, torch.Tensor]`, *optional*): S and z before the token; by default an empty memory.
        normalize (`bool`, *optional*, defaults to `True`): whether the read is divided by the accumulated weight.
        eps (`float`, *optional*, defaults to `1e-6`): constant added to the accumulated weight.
        output_normalizer (`bool`, *optional*, defaults to `False`): whether D is returned; only with `normalize`.
        correlate (`bool`, *optional*, defaults to `False`): whether tokens write and read by the correlation of routes; only
            without `normalize`. z does not change.
        writes_all (`bool`, *optional*, defaults to `False`): whether no write weight is zero. A token with the weight zero
            may hold anything, so its key and value are not read.

    Returns:
        `AttentionResult`: the output in the dtype of the values, the state after the token, and D.
    """
    (mixtures, _, components), dtype = coefficients.joined.shape, coefficients.joined.dtype
    batch, query_heads, _, routing_dim = query.shape
    key_heads, value_dim, repeats = key.shape[1], value.shape[3], query_heads // mixtures
    if repeats > 1:
        query = query.view(batch, mixtures, repeats, routing_dim)
    if key_heads < mixtures:  # one token: the dimension of the length is used for the mixtures that share a key
        key, value = (
            x.expand(-1, -1, mixtures // key_heads, -1).reshape(batch, mixtures, 1, -1) for x in (key, value)
        )

    # Queries and keys are routed together: [M, B * (R + 1), d] -> [M, B * (R + 1), C]
    x = torch.cat([query, key], dim=2).sub(coefficients.centre).clamp_(-MAX_DISTANCE, MAX_DISTANCE)
    x = x.squeeze(0) if batch == 1 else x.transpose(0, 1).reshape(mixtures, -1, routing_dim)
    gamma = torch.baddbmm(coefficients.bias, torch.cat([x, x * x], dim=-1), coefficients.joined)
    gamma = gamma.softmax(dim=-1).clamp_(min=smallest_share(dtype))
    if correlate:
        gamma = correlated(gamma)
    if batch > 1:
        gamma = gamma.view(mixtures, batch, repeats + 1, components).transpose(0, 1).flatten(0, 1)
    gamma_query, gamma_key = gamma.narrow(1, 0, repeats), gamma.select(1, repeats)  # [B * M, R, C], [B * M, C]
    if batch > 1:
        gamma_key = gamma_key.view(batch, mixtures, components)

    # S = a S + w gamma^K v^T, z = a z + w gamma^K
    if write_weight is not None and writes_all:
        gamma_key = gamma_key * write_weight
    elif write_weight is not None:
        is_unwritten = write_weight == 0
        gamma_key = (gamma_key * write_weight).masked_fill_(is_unwritten, 0.0)
        value = value.masked_fill(is_unwritten.unsqueeze(-1), 0.0)
    written = gamma_key.unsqueeze(-1)
    if state is None:
        S, z = written * value, gamma_key.view(batch, mixtures, components)
        z = torch.zeros_like(z) if correlate else z
        S = S.view(batch, mixtures, components, value_dim)
    elif log_decay is None:
        S = torch.addcmul(state[0], written, value)
        z = state[1] if correlate else state[1] + gamma_key
    else:
        decay = log_decay.to(dtype).exp()
        S = torch.addcmul(written * value, state[0], decay.unsqueeze(-1))
        z = state[1] if correlate else torch.addcmul(gamma_key, state[1], decay)

    # o = gamma^Q S / D
    output, normalizer = torch.bmm(gamma_query, S.reshape(-1, components, value_dim)), None
    if normalize:
        normalizer = torch.bmm(gamma_query, z.reshape(-1, components, 1)).add_(eps)
        output = output.div_(normalizer)
    output = output.view(batch, query_heads, 1, value_dim).to(value.dtype)
    return AttentionResult(output, (S, z), normalizer.view(batch, query_heads, 1) if output_normalizer else None)


def kept_coefficients(call: AttentionCall) -> StepCoefficients:
    """The coefficients of the mixture of a call, from the kept values of the caller if there are any."""
    dtype, floor, parameters = call.state_dtype, call.variance_floor, call[3:6]

    def compute(*parameters: Tensor) -> StepCoefficients:
        return step_coefficients(mixture_coefficients(*parameters, floor, dtype))

    return compute(*parameters) if call.kept is None else call.kept.get(("mixture", dtype), parameters, compute)


def is_single_step(call: AttentionCall) -> bool:
    """Whether `step` can take the call: one token, without gradients."""
    # A symbolic length (torch.export) is no int, and the graph must not depend on its value
    length = call.key.shape[2]
    return isinstance(length, int) and length == 1 and call.query.numel() > 0 and not call.needs_gradients


def recurrent_attention(call: AttentionCall) -> AttentionResult:
    """Compute a causal call token by token."""
    dtype, mixtures = call.state_dtype, call.means.shape[0]
    if is_single_step(call):
        return step(
            call.query,
            call.key,
            call.value,
            kept_coefficients(call),
            write_weight=None if call.write_weight is None else call.write_weight.to(dtype),
            log_decay=call.log_decay,
            state=None if call.initial_state is None else tuple(part.to(dtype) for part in call.initial_state),
            normalize=call.normalize,
            eps=call.eps,
            output_normalizer=call.output_normalizer,
            correlate=call.correlate,
            writes_all=call.writes_all,
        )
    coefficients = call.coefficients()
    gamma_query = responsibilities(call.query, coefficients, call.correlate).unflatten(
        1, (mixtures, -1)
    )  # [B, M, Hq / M, N, C]
    key, value = (
        unwritten_as_zero(repeat_heads(x, mixtures), call.write_weight) for x in (call.key, call.value.to(dtype))
    )
    gamma_key = responsibilities(key, coefficients, call.correlate)  # [B, M, N, C]
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


def cannot_run(call: AttentionCall) -> str | None:
    """Why the recurrence cannot run a call, or `None`."""
    if not call.causal or call.strict:
        return "the recurrence is causal, and position i reads what positions j <= i wrote."
    return None


def suits(call: AttentionCall) -> bool:
    """Whether "auto" takes the recurrence: for a few tokens of a causal call. A program for ONNX takes the definition."""
    # A length that is still open (torch.export) is no int, and must not be decided on
    length = call.key.shape[2]
    is_short = isinstance(length, int) and length <= SHORT
    return is_short and call.causal and not call.strict and not is_exporting_to_onnx()


WAYS.register(Way("recurrent", cannot_run, suits, recurrent_attention))
