# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Serving: the states of many streams lie in slots, and a call advances some of them, each by a token or by many, in place.

    S, z = S[slots[b]], z[slots[b]]      the recurrence over the tokens of row b      S[slots[b]], z[slots[b]] = S, z

A few tokens a row on a GPU are one launch of the decoding kernel, which reads and writes the slots where they lie. Any other call
copies the slots, goes through the public function, and writes the final states back.

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], slots [B], S [slots, M, C, dv], z [slots, M, C]
-> output [B, Hq, N, dv].
"""

import torch
from torch import Tensor

from .call import WAYS, AttentionCall, State, expect_shape, validate_call
from .functional import attend, with_mixture_heads, without_autocast
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
    """Causal attention of streams whose states lie in slots, for inference: the slots are advanced in place.

    Args:
        query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, normalize, eps, variance_floor,
            correlate, backend: as in `gaussian_mixture_attention`.
        states: `(S, z)`, `[slots, mixtures, components, value_dim]` and `[slots, mixtures, components]`, float32 (float64 when
            an input is float64). Modified. The slot of a new stream has to hold zeros.
        slots: integers, all different: `[batch]`, the slot of each row; with `sequence_ids` `[sequences]`, the slot of each
            sequence of the one row.
        sequence_ids: `[1, length]` integers: the tokens of many streams lie in one row, one stream behind the other.

    Returns:
        The output `[batch, query_heads, length, value_dim]` in `value.dtype`.

    Raises:
        ValueError: a shape or combination of arguments does not fit, an input needs gradients, or the named backend cannot run
            the call.
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
    output, after = attend(call._replace(initial_state=before), sequence_ids, backend)
    for part, new in zip(states, after, strict=True):
        part.index_copy_(0, slots, new.flatten(0, new.ndim - part.ndim).to(part.dtype))
    return output


def runs_in_place(call: AttentionCall, states: State, backend: str) -> bool:
    """Whether the decoding kernel takes the call: a few tokens where kernels run, and slots that lie together."""
    if not is_step(call) or any(part.dtype != torch.float32 for part in states):
        return False
    lies_together = all(part[:1].is_contiguous() for part in states)
    return lies_together and WAYS.choose(call, backend=backend).name == "triton"


def validate_slots(call: AttentionCall, states: State, slots: Tensor, sequence_ids: Tensor | None) -> None:
    """States and slots fit the tokens, and nothing needs a gradient, which states that are overwritten cannot have."""
    if call.needs_gradients or (torch.is_grad_enabled() and any(part.requires_grad for part in states)):
        raise ValueError(
            "A tensor needs gradients, but the states are overwritten; use torch.no_grad(), or "
            "gaussian_mixture_attention with initial_state for training."
        )
    if not isinstance(states, tuple | list) or len(states) != 2:
        raise ValueError("states must be the pair (S, z).")
    S, z = states
    mixtures, components = call.prior_logits.shape
    layout = "[slots, mixtures, components"
    expect_shape("S of states", S, f"{layout}, value_dim]", S.shape[0], mixtures, components, call.value.shape[3])
    expect_shape("z of states", z, f"{layout}]", S.shape[0], mixtures, components)
    for name, part in (("S", S), ("z", z)):
        if part.dtype != call.state_dtype:
            raise ValueError(
                f"{name} of states has dtype {part.dtype}, expected {call.state_dtype}: sums lose tokens in fewer bits."
            )
    if slots.is_floating_point() or slots.dtype == torch.bool or slots.ndim != 1:
        raise ValueError(f"slots has dtype {slots.dtype} and shape {list(slots.shape)}, expected a row of integers.")
    batch = call.query.shape[0]
    if sequence_ids is None:
        expect_shape("slots", slots, "[batch]", batch)
    elif batch != 1:
        raise ValueError(
            f"query has {batch} rows beside sequence_ids, expected 1: the sequences of one row have slots."
        )
