# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The public functions: validation, one canonical form of the call, dispatch to a backend."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import expect_one_device
from .call import (
    AFFINITY,
    PACKED,
    WAYS,
    AttentionCall,
    AttentionResult,
    State,
    expect_floating,
    has_states_per_sequence,
    run_starts,
    validate_call,
    validate_mixture,
)
from .mixture import mixture_coefficients, repeat_heads, responsibilities


def gaussian_mixture_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    raw_variances: Tensor,
    prior_logits: Tensor,
    *,
    causal: bool = True,
    write_weight: Tensor | None = None,
    log_decay: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    variance_floor: float = 1e-4,
    initial_state: State | None = None,
    output_final_state: bool = False,
    output_normalizer: bool = False,
    correlate: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, State]:
    """Gaussian mixture attention: tokens write values to mixture components, queries read them back.

    Causal, per head, with `gamma(x)` the posterior of the mixture's components given `x`:

        S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T
        z_t = a_t z_{t-1} + w_t gamma(k_t)
        o_t = gamma(q_t) S_t / (gamma(q_t) z_t + eps)        or gamma(q_t) S_t with normalize=False

    Bidirectional, every query reads the S and z that all keys wrote. With `correlate`, rho stands for gamma:

        delta = gamma - 1/C,    rho = sqrt(C) delta / sqrt(C |delta|^2 + 1e-8)

    and rho(q) . rho(k) is the correlation of two routes over the C components: a token's route is compared with the average
    component. Two tokens that are routed alike have an affinity of +1, unrelated routes 0, opposite routes -1. So a query reads
    what was written along its own route, and what everything else wrote cancels out instead of adding up.

    Source: Y. Huang and H. Raza, "Gaussian Mixture
    Attention", arXiv:2606.18283; `write_weight` w, `log_decay` log a and `correlate` are this package's
    generalisation (1, 0 and False in the paper).

    Args:
        query: `[batch, query_heads, query_length, routing_dim]`, any floating dtype, any strides.
        key: `[batch, key_value_heads, key_length, routing_dim]`.
        value: `[batch, key_value_heads, key_length, value_dim]`.
        means: `[mixtures, components, routing_dim]`. `key_value_heads` divides `mixtures`, which divides
            `query_heads`: query head i uses mixture `i // (query_heads / mixtures)`, and mixture m reads key/value
            head `m // (mixtures / key_value_heads)`.
        raw_variances: same shape as `means`; the variance is `softplus(raw_variances) + variance_floor`.
        prior_logits: `[mixtures, components]`; the prior is their softmax.
        causal: position i reads what positions j <= i wrote (equal lengths), else every query reads every key.
        write_weight: `[batch, h, key_length]` with h dividing `mixtures`, >= 0. Zero at padding; None means 1.
        log_decay: `[batch, h, length]` with h dividing `mixtures`, <= 0, causal only. `-inf` forgets everything
            before the token; None means 0, no forgetting.
        sequence_ids: `[batch, length]` integers. A maximal run of equal ids is one sequence; tokens of different
            sequences never see each other. An `initial_state` of `[batch, ...]` belongs to the first sequence of its row.
        normalize: divide by the accumulated weight (the paper), or return the plain sum.
        eps: added to the accumulated weight before the division.
        variance_floor: smallest variance, in squared units of `query` and `key`.
        initial_state: `(S, z)`, `[batch, mixtures, components, value_dim]` and `[batch, mixtures, components]`, as
            returned by an earlier call. Never modified. With `sequence_ids` it may also be `[batch, sequences, mixtures,
            components, value_dim]` and `[batch, sequences, mixtures, components]`: sequence s of a row then starts from state
            s, and the final states have the same shape. States without a sequence stay what they are. The lengths of the
            sequences are read on the host.
        output_final_state: also return `(S, z)` after the last token; of every sequence if every sequence has an initial
            state (zeros will do).
        output_normalizer: also return what the read is divided by, `D = gamma(q_t) z_t + eps`; only with `normalize`.
        correlate: write and read by the correlation of routes; only with normalize=False and two
            components or more. z is not needed, and stays 0.
        backend: "auto", or a name of `available_backends()`.

    Returns:
        The output `[batch, query_heads, query_length, value_dim]` in `value.dtype`. What was asked for besides follows in a
        tuple, in this order, in float32 (float64 when an input is float64): the normaliser `[batch, query_heads,
        query_length]`, the state `(S, z)`. So that is `(output, normalizer)`, `(output, (S, z))` or `(output, normalizer,
        (S, z))`. All of it is differentiable.

    Raises:
        ValueError: a shape or combination of arguments does not fit, or the named backend cannot run the call.
    """
    call = AttentionCall(
        query,
        key,
        value,
        means,
        raw_variances,
        prior_logits,
        causal=causal,
        write_weight=write_weight,
        log_decay=log_decay,
        normalize=normalize,
        eps=eps,
        variance_floor=variance_floor,
        initial_state=initial_state,
        output_final_state=output_final_state,
        output_normalizer=output_normalizer,
        correlate=correlate,
    )
    return attend(call, sequence_ids, backend)


def attend(
    call: AttentionCall, sequence_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, State] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, State]:
    """
    Check a call, and have it computed: [`gaussian_mixture_attention`] for callers that keep something between calls.

    Args:
        call (`AttentionCall`): the call, not checked yet.
        sequence_ids, backend: as in [`gaussian_mixture_attention`].

    Returns:
        As [`gaussian_mixture_attention`].

    Raises:
        ValueError: a shape or combination of arguments does not fit, or the named backend cannot run the call.
    """
    validate_call(call, sequence_ids)
    call = with_mixture_heads(call)
    with without_autocast(call.query.device.type):
        if has_states_per_sequence(call):
            result = PACKED.choose(call, sequence_ids, backend).run(call, sequence_ids, backend)
        elif sequence_ids is not None and not call.causal:
            result = packed_bidirectional(call, sequence_ids, backend)
        else:
            call = with_resets(call, sequence_ids)
            result = AttentionResult(*WAYS.choose(call, backend=backend).run(call))
    if call.correlate and result.state is not None:
        S, z = result.state
        result = result._replace(state=(S, torch.zeros_like(z)))
    asked_for = (result.output,)
    if call.output_normalizer:
        asked_for += (result.normalizer,)
    if call.output_final_state:
        asked_for += (result.state,)
    return asked_for if len(asked_for) > 1 else result.output


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` of [`gaussian_mixture_attention`] accepts besides "auto", by preference."""
    return WAYS.order


def gaussian_mixture_affinity(
    query: Tensor,
    key: Tensor,
    means: Tensor,
    raw_variances: Tensor,
    prior_logits: Tensor,
    *,
    causal: bool = True,
    write_weight: Tensor | None = None,
    log_decay: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    variance_floor: float = 1e-4,
    correlate: bool = False,
) -> Tensor:
    """The matrix A with A @ value = output: quadratic, for looking at what a short sequence attends to.

    A = diag(Gamma^Q z + eps)^-1 Gamma^Q (Gamma^K)^T, its lower triangle if causal, with write weights and decays
    multiplied in; without the diagonal factor when not normalised. Non-negative; with `normalize` rows sum to
    d / (d + eps), d being the accumulated weight. With `correlate`, rho stands for gamma: A is signed, and its entries lie in
    [-w, w].

    Args:
        query, key, means, raw_variances, prior_logits, causal, write_weight, log_decay, sequence_ids, normalize, eps,
            variance_floor, correlate: as in `gaussian_mixture_attention`.

    Returns:
        `[batch, query_heads, query_length, key_length]`, in float32 (float64 when an input is float64).

    Raises:
        ValueError: a shape or combination of arguments does not fit.
    """
    call = AttentionCall(
        query,
        key,
        key[..., :0],
        means,
        raw_variances,
        prior_logits,
        causal=causal,
        write_weight=write_weight,
        log_decay=log_decay,
        normalize=normalize,
        eps=eps,
        variance_floor=variance_floor,
        correlate=correlate,
    )
    validate_call(call, sequence_ids)
    with without_autocast(query.device.type):
        call = with_mixture_heads(call)
        pairs = AFFINITY.choose(call).run(call)
        if sequence_ids is not None:
            run = run_starts(sequence_ids).cumsum(dim=-1)
            pairs = pairs * (run.unsqueeze(-1) == run.unsqueeze(-2)).unsqueeze(1)
        return pairs / (pairs.sum(dim=-1, keepdim=True) + eps) if normalize else pairs


def gaussian_mixture_responsibilities(
    x: Tensor, means: Tensor, raw_variances: Tensor, prior_logits: Tensor, *, variance_floor: float = 1e-4
) -> Tensor:
    """Posterior probability of every component given every token.

        gamma_c(x) = softmax_c( log pi_c - 1/2 sum_m [ log sigma^2_cm + (x_m - mu_cm)^2 / sigma^2_cm ] )

    Args:
        x: `[batch, heads, length, routing_dim]`, queries or keys; mixtures must be a multiple or a divisor of heads.
        means, raw_variances, prior_logits, variance_floor: as in `gaussian_mixture_attention`.

    Returns:
        `[batch, max(heads, mixtures), length, components]`, in float32 (float64 when an input is float64).

    Raises:
        ValueError: a shape does not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {list(x.shape)}, expected [batch, heads, length, routing_dim].")
    expect_floating("x", x)
    validate_mixture(means, raw_variances, prior_logits, x.shape[-1])
    mixture = (("means", means), ("raw_variances", raw_variances), ("prior_logits", prior_logits))
    expect_one_device((("x", x), *mixture))
    heads, mixtures = x.shape[1], means.shape[0]
    if heads % mixtures != 0 and mixtures % heads != 0:
        raise ValueError(f"x has {heads} heads and means {mixtures} mixtures; expected one to divide the other.")
    with without_autocast(x.device.type):
        dtype = torch.promote_types(x.dtype, torch.float32)
        coefficients = mixture_coefficients(means, raw_variances, prior_logits, variance_floor, dtype)
        return responsibilities(repeat_heads(x, max(heads, mixtures)), coefficients)


def without_autocast(device_type: str) -> AbstractContextManager:
    """
    Autocast would run the matrix products on half the digits; the backends choose their precision themselves. Where it is off
    there is nothing to do; a compiled or exported program says so all the same, for it may be run with autocast.
    """
    if not torch.amp.is_autocast_available(device_type):  # "meta"
        return nullcontext()
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return nullcontext()


def with_mixture_heads(call: AttentionCall) -> AttentionCall:
    """The call with write_weight and log_decay [batch, 1 or mixtures, length]."""
    mixtures = call.means.shape[0]
    given = {"write_weight": call.write_weight, "log_decay": call.log_decay}
    narrow = {name: x for name, x in given.items() if x is not None and x.shape[1] not in (1, mixtures)}
    return call._replace(**{name: repeat_heads(x, mixtures) for name, x in narrow.items()}) if narrow else call


def with_resets(call: AttentionCall, sequence_ids: Tensor | None) -> AttentionCall:
    """The causal call with log a = -inf at the first token of every sequence but a row's first."""
    if sequence_ids is None:
        return call
    starts = run_starts(sequence_ids).unsqueeze(1)
    log_decay = torch.zeros_like(starts, dtype=call.state_dtype) if call.log_decay is None else call.log_decay
    return call._replace(log_decay=log_decay.masked_fill(starts, float("-inf")))


def packed_bidirectional(call: AttentionCall, sequence_ids: Tensor, backend: str) -> AttentionResult:
    """Every token reads its whole sequence: what j <= i wrote, forwards, plus what j > i wrote, backwards.

    Both are causal calls with resets, so packing needs nothing that causal attention does not have. A column of ones
    beside the values accumulates the denominator.
    """
    value = call.value.to(call.state_dtype)
    if call.normalize:
        value = F.pad(value, (0, 1), value=1.0)
    plain = call._replace(value=value, causal=True, normalize=False, output_normalizer=False)
    forwards = with_resets(plain, sequence_ids)
    mirrored = plain._replace(
        query=call.query.flip(2),
        key=call.key.flip(2),
        value=value.flip(2),
        write_weight=None if call.write_weight is None else call.write_weight.flip(2),
        strict=True,
    )
    backwards = with_resets(mirrored, sequence_ids.flip(1))
    # One way for both halves: one that can leave out the diagonal.
    way = WAYS.choose(backwards, backend=backend)
    output = way.run(forwards)[0] + way.run(backwards)[0].flip(2)
    normalizer = None
    if call.normalize:
        normalizer = output[..., -1] + call.eps
        output = output[..., :-1] / normalizer.unsqueeze(-1)
    return AttentionResult(output.to(call.value.dtype), None, normalizer)
