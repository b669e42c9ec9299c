# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Serving: the states of many streams are in slots. A call advances some of these states in place, by one or by many tokens.

    S, z = S[slots[b]], z[slots[b]]      the recurrence over the tokens of row b      S[slots[b]], z[slots[b]] = S, z

On a GPU, a few tokens per row take one launch of the decoding kernel, and packed sequences one launch of the kernel for packed
sequences. Both read and write the slots directly. Any other call copies the slots, uses the public function, and writes the
final states back.

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], slots [B], S [slots, M, C, dv], z [slots, M, C]
-> output [B, Hq, N, dv].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import expect_one_device
from .call import (
    WAYS,
    AttentionCall,
    AttentionResult,
    State,
    expect_pair,
    expect_shape,
    validate_call,
    without_delta_rule,
)
from .functional import with_mixture_heads, without_autocast
from .fused import is_step
from .packed import PackedSequences, advance_packed, attend_in_batches, runs_packed


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
    sequence_lengths: Sequence[int] | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    variance_floor: float = 1e-4,
    output_normalizer: bool = False,
    correlate: bool = False,
    delta_strength: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
            `sequence_ids` or `sequence_lengths`, of each sequence of the one row.
        write_weight (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`].
        log_decay (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`].
        sequence_ids (`torch.Tensor` of shape `(1, length)`, *optional*): integers: the tokens of many streams are in one
            row, one stream after the other. The host waits for the device to read the lengths.
        sequence_lengths (`Sequence[int]`, *optional*): instead of `sequence_ids`, the number of tokens of each stream. Nothing
            waits for the device.
        normalize (`bool`, *optional*, defaults to `True`): whether to divide by the accumulated weight.
        eps (`float`, *optional*, defaults to `1e-6`): constant added to the accumulated weight before the division.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance.
        output_normalizer (`bool`, *optional*, defaults to `False`): see [`gaussian_mixture_attention`].
        correlate (`bool`, *optional*, defaults to `False`): see [`gaussian_mixture_attention`].
        delta_strength (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`].
        backend (`str`, *optional*, defaults to `"auto"`): see [`gaussian_mixture_attention`].

    Returns:
        `torch.Tensor` of shape `(batch, query_heads, length, value_dim)`: the output, in `value.dtype`. With
        `output_normalizer`, a pair of the output and the normaliser `(batch, query_heads, length)`.

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
        output_normalizer=output_normalizer,
        correlate=correlate,
        delta_strength=delta_strength,
    )
    sequences = sequence_ids
    if sequence_lengths is not None:
        if sequence_ids is not None:
            raise ValueError(
                "sequence_ids and sequence_lengths are given, and both say where sequences end; pass one."
            )
        sequences = PackedSequences([sequence_lengths], query.device)
    return attend_in_slots(call, sequences, states, slots, backend)


class Slots:
    """
    The slots of the rows or packed sequences of a call, for layers that keep their states in slots.

    Args:
        index (`torch.Tensor` of shape `(batch,)` or `(sequences,)`): the slot of each.
    """

    def __init__(self, index: Tensor):
        self.index = index

    def attend(
        self, call: AttentionCall, sequences: Tensor | PackedSequences | None, states: State, backend: str = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Advance the slots of `states` by a call, see [`attend_in_slots`]."""
        return attend_in_slots(call, sequences, states, self.index, backend)


def attend_in_slots(
    call: AttentionCall,
    sequences: Tensor | PackedSequences | None,
    states: State,
    slots: Tensor,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """
    Check a call and compute it: [`gaussian_mixture_attention_in_slots`] for callers that keep values between calls.

    Args:
        call (`AttentionCall`): the call without initial state, not checked yet.
        sequences (`torch.Tensor` or `PackedSequences`, *optional*): the packed sequences, as their ids or as their lengths.
        states (`tuple[torch.Tensor, torch.Tensor]`): see [`gaussian_mixture_attention_in_slots`].
        slots (`torch.Tensor`): see [`gaussian_mixture_attention_in_slots`].
        backend (`str`, *optional*, defaults to `"auto"`): see [`gaussian_mixture_attention`].

    Returns:
        `torch.Tensor` or `tuple`: see [`gaussian_mixture_attention_in_slots`].

    Raises:
        ValueError: if a shape or a combination of arguments does not fit, or the named backend cannot run the call.
    """
    validate_call(call, sequences if isinstance(sequences, Tensor) else None)
    validate_slots(call, states, slots, sequences)
    if isinstance(sequences, Tensor):
        sequences = PackedSequences.of_ids(sequences, len(slots))
    call = with_mixture_heads(call)
    with without_autocast(call.query.device.type):
        output, normalizer = advance(call, sequences, states, slots, backend)
    return (output, normalizer) if call.output_normalizer else output


def advance(
    call: AttentionCall, sequences: PackedSequences | None, states: State, slots: Tensor, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Advance the slots: output and normaliser."""
    if call.delta_strength is not None and sequences is None:
        before = tuple(part.index_select(0, slots.long()) for part in states)
        call = without_delta_rule(call._replace(initial_state=before))._replace(initial_state=None)
    lie_together = all(part.dtype == torch.float32 and part[:1].is_contiguous() for part in states)
    if lie_together and sequences is not None and runs_packed(call, sequences, backend):
        return advance_packed(call, sequences, states, slots)
    if lie_together and sequences is None and is_step(call) and WAYS.choose(call, backend=backend).name == "triton":
        from .triton import decoding  # noqa: F401 (it defines the operator)

        output, normalizer = torch.ops.gma_hf.fused_decoding_in_slots(
            *call[:6], call.write_weight, call.log_decay, *states, slots, call.eps if call.normalize else None,
            call.variance_floor, call.output_normalizer, call.correlate,
        )  # fmt: skip
        return output, normalizer
    slots = slots.long()
    before = tuple(part.index_select(0, slots) for part in states)
    if sequences is None:
        call = call._replace(initial_state=before)
        result = AttentionResult(*WAYS.choose(call, backend=backend).run(call))
    else:
        before = tuple(part[None] for part in before)
        result = attend_in_batches(call._replace(initial_state=before), sequences, backend)
    S, z = states
    after_S, after_z = result.state
    S.index_copy_(0, slots, after_S.flatten(0, after_S.ndim - S.ndim).to(S.dtype))
    if not call.correlate:  # correlated routes have no z
        z.index_copy_(0, slots, after_z.flatten(0, after_z.ndim - z.ndim).to(z.dtype))
    return result.output, result.normalizer


def validate_slots(
    call: AttentionCall, states: State, slots: Tensor, sequences: Tensor | PackedSequences | None
) -> None:
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
    batch, length = call.query.shape[0], call.query.shape[2]
    if sequences is None:
        expect_shape("slots", slots, "[batch]", batch)
    elif batch != 1:
        raise ValueError(
            f"query has {batch} rows beside packed sequences, expected 1: the sequences of one row have slots."
        )
    elif isinstance(sequences, PackedSequences):
        validate_lengths(sequences.lengths[0], length)
        expect_shape("slots", slots, "[sequences]", len(sequences.lengths[0]))
    if call.needs_gradients or (torch.is_grad_enabled() and any(part.requires_grad for part in states)):
        raise ValueError(
            "A tensor needs gradients, but the states are overwritten; use torch.no_grad(), or "
            "gaussian_mixture_attention with initial_state for training."
        )


def validate_lengths(lengths: list, length: int) -> None:
    """Check that the lengths of the sequences of a row are those of the row."""
    wrong = [x for x in lengths if isinstance(x, bool) or not isinstance(x, int) or x < 0]
    if wrong:
        raise ValueError(f"sequence_lengths has {wrong[0]!r}, expected integers that are not negative.")
    if sum(lengths) != length:
        raise ValueError(f"sequence_lengths add up to {sum(lengths)}, but the row has {length} tokens.")
