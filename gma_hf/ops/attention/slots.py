# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Serving: the states of many streams are in slots. A call advances some of these states in place, by one or by many tokens.

    S, z = S[slots[b]], z[slots[b]]      the recurrence over the tokens of row b      S[slots[b]], z[slots[b]] = S, z

On a GPU, a few tokens per row take one launch of the decoding kernel, which reads and writes the slots directly. Any other
call copies the slots, uses the public function, and writes the final states back.

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], slots [B], S [slots, M, C, dv], z [slots, M, C]
-> output [B, Hq, N, dv].
"""

import torch
from torch import Tensor

from ..dispatch import expect_one_device
from .call import WAYS, AttentionCall, State, expect_pair, expect_shape, validate_call
from .functional import compute, with_mixture_heads, without_autocast
from .fused import is_step


def gaussian_mixture_attention_in_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    raw_variances: Tensor,
    prior_logits: Tensor,
    *,
    states: State,
    slots: Tensor,
    write_weight: Tensor | None = None,
    log_decay: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    variance_floor: float = 1e-4,
    correlate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """
    Causal attention of streams whose states are in slots, for inference. The call advances the slots in place.

    Args:
        query (`torch.Tensor` of shape `(batch, query_heads, length, routing_dim)`): queries.
        key (`torch.Tensor` of shape `(batch, key_value_heads, length, routing_dim)`): keys.
        value (`torch.Tensor` of shape `(batch, key_value_heads, length, value_dim)`): values.
        means (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): means of the components.
        raw_variances (`torch.Tensor` of shape `(mixtures, components, routing_dim)`): the variance is
            `softplus(raw_variances) + variance_floor`.
        prior_logits (`torch.Tensor` of shape `(mixtures, components)`): the prior is their softmax.
        states (`tuple[torch.Tensor, torch.Tensor]`): `(S, z)` of shapes `(slots, mixtures, components, value_dim)` and
            `(slots, mixtures, components)`, in float32 (float64 if an input is float64). The call changes them. The slot of
            a new stream has to hold zeros.
        slots (`torch.Tensor` of shape `(batch,)` or `(sequences,)`): different integers: the slot of each row or, with
            `sequence_ids`, of each sequence of the one row.
        write_weight (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`].
        log_decay (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`].
        sequence_ids (`torch.Tensor` of shape `(1, length)`, *optional*): integers: the tokens of many streams are in one
            row, one stream after the other.
        normalize (`bool`, *optional*, defaults to `True`): whether to divide by the accumulated weight.
        eps (`float`, *optional*, defaults to `1e-6`): constant added to the accumulated weight before the division.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance.
        correlate (`bool`, *optional*, defaults to `False`): see [`gaussian_mixture_attention`].
        backend (`str`, *optional*, defaults to `"auto"`): see [`gaussian_mixture_attention`].

    Returns:
        `torch.Tensor` of shape `(batch, query_heads, length, value_dim)`: the output, in `value.dtype`.

    Raises:
        ValueError: if a shape or a combination of arguments does not fit, an input needs gradients, or the named backend
            cannot run the call.
    """
    call = AttentionCall(
        query,
        key,
        value,
        means,
        raw_variances,
        prior_logits,
        write_weight=write_weight,
        log_decay=log_decay,
        normalize=normalize,
        eps=eps,
        variance_floor=variance_floor,
        output_final_state=True,
        correlate=correlate,
    )
    validate_call(call, sequence_ids)
    validate_slots(call, states, slots, sequence_ids)
    if sequence_ids is None and runs_in_place(call, states, backend):
        from .triton import decoding  # noqa: F401 (it defines the operator)

        call = with_mixture_heads(call)
        with without_autocast(query.device.type):
            return torch.ops.gma_hf.fused_decoding_in_slots(
                *call[:6], call.write_weight, call.log_decay, *states, slots, eps if normalize else None,
                variance_floor, correlate,
            )  # fmt: skip
    slots = slots.long()
    before = tuple(part.index_select(0, slots) for part in states)
    if sequence_ids is not None:
        before = tuple(part[None] for part in before)
    output, after = compute(call._replace(initial_state=before), sequence_ids, backend)
    for part, new in zip(states, after, strict=True):
        part.index_copy_(0, slots, new.flatten(0, new.ndim - part.ndim).to(part.dtype))
    return output


def runs_in_place(call: AttentionCall, states: State, backend: str) -> bool:
    """Whether the decoding kernel takes the call: a few tokens, a device with kernels, and contiguous slots."""
    if not is_step(call) or any(part.dtype != torch.float32 for part in states):
        return False
    lies_together = all(part[:1].is_contiguous() for part in states)
    return lies_together and WAYS.choose(call, backend=backend).name == "triton"


def validate_slots(call: AttentionCall, states: State, slots: Tensor, sequence_ids: Tensor | None) -> None:
    """Check that states and slots fit the tokens, and that nothing needs a gradient, because the states are overwritten."""
    expect_pair("states", states)
    if not isinstance(slots, Tensor):
        raise ValueError(f"slots is {type(slots).__name__}, expected a tensor of integers.")
    S, z = states
    mixtures, components = call.prior_logits.shape
    layout, number = "[slots, mixtures, components", S.shape[0] if S.ndim > 0 else 1
    expect_shape("S of states", S, f"{layout}, value_dim]", number, mixtures, components, call.value.shape[3])
    expect_shape("z of states", z, f"{layout}]", number, mixtures, components)
    for name, part in (("S", S), ("z", z)):
        if part.dtype != call.state_dtype:
            raise ValueError(
                f"{name} of states has dtype {part.dtype}, expected {call.state_dtype}: sums lose tokens in fewer bits."
            )
    expect_one_device((("query", call.query), ("S of states", S), ("z of states", z), ("slots", slots)))
    if slots.is_floating_point() or slots.is_complex() or slots.dtype == torch.bool or slots.ndim != 1:
        raise ValueError(f"slots has dtype {slots.dtype} and shape {list(slots.shape)}, expected a row of integers.")
    batch = call.query.shape[0]
    if sequence_ids is None:
        expect_shape("slots", slots, "[batch]", batch)
    elif batch != 1:
        raise ValueError(
            f"query has {batch} rows beside sequence_ids, expected 1: the sequences of one row have slots."
        )
    if call.needs_gradients or (torch.is_grad_enabled() and any(part.requires_grad for part in states)):
        raise ValueError(
            "A tensor needs gradients, but the states are overwritten; use torch.no_grad(), or "
            "gaussian_mixture_attention with initial_state for training."
        )
