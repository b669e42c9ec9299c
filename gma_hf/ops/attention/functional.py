# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The public functions: check a call, bring it into one form, and dispatch it to a backend."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import expect_one_device
from .call import (
    AFFINITY,
    OPTIONAL,
    PACKED,
    WAYS,
    AttentionCall,
    AttentionResult,
    State,
    expect_constant,
    expect_floating,
    has_states_per_sequence,
    run_starts,
    validate_call,
    validate_mixture,
    without_delta_rule,
)
from .mixture import mixture_coefficients, plus_eps, repeat_heads, responsibilities


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
    delta_strength: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, State]:
    """
    Gaussian mixture attention: tokens write values to the components of a mixture, and queries read them.

    Causal, per head, with `gamma(x)` the posterior of the components given `x`:

        S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T
        z_t = a_t z_{t-1} + w_t gamma(k_t)
        o_t = gamma(q_t) S_t / (gamma(q_t) z_t + eps)        or gamma(q_t) S_t with normalize=False

    Bidirectional, every query reads the S and z of all keys. With `correlate`, rho replaces gamma:

        delta = gamma - 1/C,    rho = sqrt(C) delta / sqrt(C |delta|^2 + 1e-8)

    rho(q) . rho(k) is the correlation of two routes over the C components: it compares the route of a token with the average
    component. Two tokens with the same route have an affinity of +1, unrelated routes have 0, and opposite routes have -1.
    So a query reads what was written along its own route, and everything else cancels out instead of adding up.

    With `delta_strength` beta, a token writes what the memory does not say yet for its key (the delta rule): u replaces v in S,

        u_t = beta_t (v_t - a_t gamma(k_t) S_{t-1})        and with `correlate` rho(k_t) instead of gamma(k_t)

    Source: Y. Huang and H. Raza, "Gaussian Mixture Attention", arXiv:2606.18283. `write_weight` w, `log_decay` log a,
    `correlate` and `delta_strength` are the generalisation of this package (1, 0, `False` and none in the paper).

    Args:
        query (`torch.Tensor` of shape `(batch, query_heads, query_length, routing_dim)`): queries, with any floating dtype
            and any strides.
        key (`torch.Tensor` of shape `(batch, key_value_heads, key_length, routing_dim)`): keys.
        value (`torch.Tensor` of shape `(batch, key_value_heads, key_length, value_dim)`): values.
        means (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): means of the components. `key_value_heads`
            divides `mixtures`, and `mixtures` divides `query_heads`: query head i uses mixture `i // (query_heads /
            mixtures)`, and mixture m reads key/value head `m // (mixtures / key_value_heads)`.
        raw_variances (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): the variance is
            `softplus(raw_variances) + variance_floor`.
        prior_logits (`torch.Tensor` of shape `(mixtures, components)`): the prior is their softmax.
        causal (`bool`, *optional*, defaults to `True`): whether position i reads the writes of positions j <= i only (equal
            lengths). Otherwise every query reads every key.
        write_weight (`torch.Tensor` of shape `(batch, h, key_length)`, *optional*): weights >= 0, zero at padding; h divides
            `mixtures`. By default 1.
        log_decay (`torch.Tensor` of shape `(batch, h, length)`, *optional*): numbers <= 0, causal only; h divides
            `mixtures`. `-inf` forgets everything before the token. By default 0, no forgetting.
        sequence_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): integers. A maximal run of equal ids is one
            sequence. Tokens of different sequences never see each other. An `initial_state` of shape `(batch, ...)` belongs
            to the first sequence of its row.
        normalize (`bool`, *optional*, defaults to `True`): whether to divide by the accumulated weight (the paper), or to
            return the plain sum.
        eps (`float`, *optional*, defaults to `1e-6`): constant added to the accumulated weight before the division.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance, in squared units of `query` and `key`.
        initial_state (`tuple[torch.Tensor, torch.Tensor]`, *optional*): `(S, z)` of shapes `(batch, mixtures, components,
            value_dim)` and `(batch, mixtures, components)`, as an earlier call returned them. They do not change. With
            `sequence_ids`, the shapes may also be `(batch, sequences, mixtures, components, value_dim)` and `(batch,
            sequences, mixtures, components)`: sequence s of a row then starts from state s, and the final states have the
            same shapes. States without a sequence stay as they are. The lengths of the sequences are read on the host.
        output_final_state (`bool`, *optional*, defaults to `False`): whether to return `(S, z)` after the last token. If
            every sequence has an initial state (zeros are possible), the states of every sequence are returned.
        output_normalizer (`bool`, *optional*, defaults to `False`): whether to return the divisor of the read, `D =
            gamma(q_t) z_t + eps`; only with `normalize`.
        correlate (`bool`, *optional*, defaults to `False`): whether tokens write and read by the correlation of routes; only
            with `normalize=False` and at least two components. z is not needed, and stays 0.
        delta_strength (`torch.Tensor` of shape `(batch, h, length)`, *optional*): strengths from 0 to 1, causal and with
            `normalize=False` only; h divides `mixtures`. A token with the strength 1 replaces what the memory says for its
            key, and a token with the strength 0 writes nothing. By default, values are written as they are.
        backend (`str`, *optional*, defaults to `"auto"`): `"auto"`, or a name of [`available_backends`].

    Returns:
        `torch.Tensor` of shape `(batch, query_heads, query_length, value_dim)`: the output, in `value.dtype`. If more was
        requested, a tuple: `(output, normalizer)`, `(output, (S, z))` or `(output, normalizer, (S, z))`. The normaliser
        `(batch, query_heads, query_length)` and the state are in float32 (float64 if an input is float64). All results are
        differentiable.

    Raises:
        ValueError: if a shape or a combination of arguments does not fit, or the named backend cannot run the call.
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
        delta_strength=delta_strength,
    )
    return attend(call, sequence_ids, backend)


def attend(
    call: AttentionCall, sequence_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, State] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, State]:
    """
    Check a call and compute it: [`gaussian_mixture_attention`] for callers that keep values between calls.

    Args:
        call (`AttentionCall`): the call, not checked yet.
        sequence_ids (`torch.Tensor`, *optional*): see [`gaussian_mixture_attention`].
        backend (`str`, *optional*, defaults to `"auto"`): see [`gaussian_mixture_attention`].

    Returns:
        `torch.Tensor` or `tuple`: see [`gaussian_mixture_attention`].

    Raises:
        ValueError: if a shape or a combination of arguments does not fit, or the named backend cannot run the call.
    """
    validate_call(call, sequence_ids)
    return compute(call, sequence_ids, backend)


def compute(
    call: AttentionCall, sequence_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, State] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, State]:
    """Compute a call that was checked, see [`attend`]."""
    call = with_mixture_heads(call)
    with without_autocast(call.query.device.type):
        if has_states_per_sequence(call):
            result = PACKED.choose(call, sequence_ids, backend).run(call, sequence_ids, backend)
        elif sequence_ids is not None and not call.causal:
            result = packed_bidirectional(call, sequence_ids, backend)
        else:
            call = without_delta_rule(with_resets(call, sequence_ids))
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
    """
    The backends of [`gaussian_mixture_attention`].

    Returns:
        `tuple[str, ...]`: the names that `backend` accepts besides `"auto"`, in order of preference.
    """
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
    delta_strength: Tensor | None = None,
) -> Tensor:
    """
    The matrix A with A @ value = output, for the analysis of short sequences: its cost is quadratic in the length.

    A = diag(Gamma^Q z + eps)^-1 Gamma^Q (Gamma^K)^T. Causal calls take the lower triangle. Write weights and decays are
    multiplied in. Without `normalize` there is no diagonal factor. A is not negative. With `normalize` its rows sum to d /
    (d + eps), where d is the accumulated weight. With `correlate`, rho replaces gamma: A has signs, and its entries lie in
    [-w, w].

    Args:
        query (`torch.Tensor` of shape `(batch, query_heads, query_length, routing_dim)`): queries.
        key (`torch.Tensor` of shape `(batch, key_value_heads, key_length, routing_dim)`): keys.
        means (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): means of the components.
        raw_variances (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): the variance is
            `softplus(raw_variances) + variance_floor`.
        prior_logits (`torch.Tensor` of shape `(mixtures, components)`): the prior is their softmax.
        causal (`bool`, *optional*, defaults to `True`): see [`gaussian_mixture_attention`].
        write_weight (`torch.Tensor` of shape `(batch, h, key_length)`, *optional*): see [`gaussian_mixture_attention`].
        log_decay (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`].
        sequence_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): see [`gaussian_mixture_attention`].
        normalize (`bool`, *optional*, defaults to `True`): whether to divide by the accumulated weight.
        eps (`float`, *optional*, defaults to `1e-6`): constant added to the accumulated weight before the division.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance.
        correlate (`bool`, *optional*, defaults to `False`): see [`gaussian_mixture_attention`].
        delta_strength (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`]. A token
            then also counts against later tokens of its route, so entries may have any sign.

    Returns:
        `torch.Tensor` of shape `(batch, query_heads, query_length, key_length)`: A, in float32 (float64 if an input is
        float64).

    Raises:
        ValueError: if a shape or a combination of arguments does not fit.
    """
    values = key[..., :0]
    if delta_strength is not None:
        # The corrections are linear in the values, so the matrix is what the identity as values gives
        identity = torch.eye(key.shape[2], dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
        values = identity.expand(*key.shape[:2], -1, -1)
    call = AttentionCall(
        query,
        key,
        values,
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
        delta_strength=delta_strength,
    )
    if delta_strength is not None:
        return attend(call, sequence_ids, "reference")
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
    """
    The posterior probability of every component given every token.

        gamma_c(x) = softmax_c( log pi_c - 1/2 sum_m [ log sigma^2_cm + (x_m - mu_cm)^2 / sigma^2_cm ] )

    Args:
        x (`torch.Tensor` of shape `(batch, heads, length, routing_dim)`): queries or keys. The number of mixtures is a
            multiple or a divisor of `heads`.
        means (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): means of the components.
        raw_variances (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): the variance is
            `softplus(raw_variances) + variance_floor`.
        prior_logits (`torch.Tensor` of shape `(mixtures, components)`): the prior is their softmax.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance.

    Returns:
        `torch.Tensor` of shape `(batch, max(heads, mixtures), length, components)`: gamma, in float32 (float64 if an input
        is float64).

    Raises:
        ValueError: if a shape does not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {list(x.shape)}, expected [batch, heads, length, routing_dim].")
    expect_floating("x", x)
    expect_constant("variance_floor", variance_floor)
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
    Turn autocast off, because it would compute the matrix products with half of the digits. The backends choose their
    precision themselves. If autocast is off there is nothing to do, but a compiled or exported program turns it off in any
    case, because it may run under autocast.
    """
    if device_type == "meta":  # which has no autocast; to ask PyTorch for it breaks the graph of a compiled model
        return nullcontext()
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return nullcontext()


def with_mixture_heads(call: AttentionCall) -> AttentionCall:
    """The call with write_weight, log_decay and delta_strength of shape [batch, 1 or mixtures, length]."""
    mixtures = call.means.shape[0]
    given = {name: getattr(call, name) for name in OPTIONAL}
    narrow = {name: x for name, x in given.items() if x is not None and x.shape[1] not in (1, mixtures)}
    return call._replace(**{name: repeat_heads(x, mixtures) for name, x in narrow.items()}) if narrow else call


def with_resets(call: AttentionCall, sequence_ids: Tensor | None) -> AttentionCall:
    """The causal call with log a = -inf at the first token of every sequence, except the first sequence of a row."""
    if sequence_ids is None:
        return call
    starts = run_starts(sequence_ids).unsqueeze(1)
    log_decay = torch.zeros_like(starts, dtype=call.state_dtype) if call.log_decay is None else call.log_decay
    return call._replace(log_decay=log_decay.masked_fill(starts, float("-inf")))


def packed_bidirectional(call: AttentionCall, sequence_ids: Tensor, backend: str) -> AttentionResult:
    """
    Every token reads its whole sequence: the writes of j <= i forwards, plus the writes of j > i backwards.

    Both are causal calls with resets, so packing needs only causal attention. A column of ones beside the values accumulates
    the denominator.
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
        normalizer = plus_eps(output[..., -1:], call.eps)
        output = output[..., :-1] / normalizer
        normalizer = normalizer.squeeze(-1)
    return AttentionResult(output.to(call.value.dtype), None, normalizer)
