# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A call of the operator, as every backend receives it, its result, and the checks of its arguments. The checks read shapes and
combinations only, never values, so calls can be compiled.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat import is_transformed
from ..dispatch import BACKENDS, Ways, expect_one_device
from .mixture import MixtureCoefficients, mixture_coefficients


# The backends of attention. Each registers itself when the package imports it
WAYS = Ways("call", BACKENDS)
# The matrix that a call without values implies, by its definition only
AFFINITY = Ways("affinity", ("reference",))
# The delta rule, as the call that computes the same without it
DELTA_RULE = Ways("call with the delta rule", ("corrections",))
# Packed sequences with their own states: batches of sequences, each batch by one of the backends above
PACKED = Ways("packed call", ("rows",))
GIVEN = ("query", "key", "value", "means", "raw_variances", "prior_logits")
OPTIONAL = ("write_weight", "log_decay", "delta_strength")  # [batch, h, key_length]
State = tuple[Tensor, Tensor]  # S [batch, mixtures, components, value_dim], z [batch, mixtures, components]


class AttentionCall(NamedTuple):
    """
    One checked call of the operator, as every backend receives it.

    Packed sequences are resets in `log_decay` already, or rows if each sequence has its own state. So a backend needs only
    the write weight and the decay of the general recurrence.
    """

    query: Tensor  # [batch, query_heads, query_length, routing_dim]
    key: Tensor  # [batch, key_value_heads, key_length, routing_dim]
    value: Tensor  # [batch, key_value_heads, key_length, value_dim]
    means: Tensor  # [mixtures, components, routing_dim]
    raw_variances: Tensor  # [mixtures, components, routing_dim]
    prior_logits: Tensor  # [mixtures, components]
    causal: bool = True
    write_weight: Tensor | None = None  # [batch, 1 or mixtures, key_length]
    log_decay: Tensor | None = None  # [batch, 1 or mixtures, key_length], causal only
    normalize: bool = True
    eps: float = 1e-6
    variance_floor: float = 1e-4
    initial_state: State | None = None
    output_final_state: bool = False
    output_normalizer: bool = False  # only where the read is normalised
    correlate: bool = False  # rho instead of gamma, where the read is not normalised
    writes_all: bool = False  # no write weight is 0, which is known without reading values
    kept: Any = (
        None  # keeps what depends on the mixture alone between decoding steps: `get(name, parameters, compute)`
    )
    delta_strength: Tensor | None = None  # [batch, 1 or mixtures, key_length]; a backend gets calls without it
    strict: bool = False  # position i reads j < i instead of j <= i; only in causal calls with log_decay

    @property
    def state_dtype(self) -> torch.dtype:
        """Precision of logits, responsibilities and state: float32, or float64 if an input is float64."""
        # Without `torch.promote_types`, which would be one more call into PyTorch
        is_double = torch.float64 in (self.query.dtype, self.key.dtype, self.value.dtype)
        return torch.float64 if is_double else torch.float32

    @property
    def needs_gradients(self) -> bool:
        """Whether autograd records the call, or may do so."""
        if not torch.is_grad_enabled():
            return False
        if is_transformed():
            return True
        tensors = (*self[:6], self.write_weight, self.log_decay, self.delta_strength, *(self.initial_state or ()))
        return any(x is not None and x.requires_grad for x in tensors)

    def coefficients(self) -> MixtureCoefficients:
        """The mixture as the affine map to its logits, in the precision of the state."""
        return mixture_coefficients(
            self.means, self.raw_variances, self.prior_logits, self.variance_floor, self.state_dtype
        )


class AttentionResult(NamedTuple):
    """The result of a backend. A pair of the first two fields is enough if the normaliser is not requested."""

    output: Tensor  # [batch, query_heads, query_length, value_dim]
    state: State | None  # after the last token
    normalizer: Tensor | None = (
        None  # D = gamma^Q z + eps [batch, query_heads, query_length], in the state's precision
    )


def has_states_per_sequence(call: AttentionCall) -> bool:
    """Whether every packed sequence starts from its own state."""
    return call.initial_state is not None and call.initial_state[0].ndim == 5


def without_delta_rule(call: AttentionCall) -> AttentionCall:
    """The call that computes the same with plain writes, for the backends."""
    return call if call.delta_strength is None else DELTA_RULE.last.run(call)


def run_starts(sequence_ids: Tensor) -> Tensor:
    """`True` where a new run of equal ids begins, [batch, length]; `False` at position 0, which continues a state."""
    changes = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return F.pad(changes, (min(1, sequence_ids.shape[1]), 0))


# Messages are formatted only when they are raised: formatting a size would fix it to a constant in a compiled graph.


def expect_shape(name: str, x: Tensor, layout: str, *sizes: int, advice: str = "") -> None:
    """Check that `x` has these sizes, which `layout` names."""
    if x.shape != sizes:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {layout} = {list(sizes)}. {advice}".rstrip())


def expect_pair(name: str, state: Any) -> None:
    """Check that a state is a pair of tensors."""
    if not isinstance(state, tuple | list):
        raise ValueError(f"{name} is {type(state).__name__}, expected the pair (S, z).")
    if len(state) != 2:
        raise ValueError(f"{name} has {len(state)} parts, expected the pair (S, z).")
    for part, x in zip("Sz", state, strict=True):
        if not isinstance(x, Tensor):
            raise ValueError(f"{part} of {name} is {type(x).__name__}, expected a tensor.")


def expect_floating(name: str, x: Tensor) -> None:
    """Check that `x` is a floating point tensor."""
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}, expected a floating point dtype.")


def validate_mixture(means: Tensor, raw_variances: Tensor, prior_logits: Tensor, routing_dim: int) -> None:
    """Check that the tensors of the mixture fit each other and the tokens."""
    for name, x in (("means", means), ("raw_variances", raw_variances), ("prior_logits", prior_logits)):
        expect_floating(name, x)
    if means.ndim != 3 or means.shape[-1] != routing_dim:
        raise ValueError(
            f"means has shape {list(means.shape)}, expected [mixtures, components, routing_dim] with routing_dim = "
            f"{routing_dim}, the last size of the tokens."
        )
    expect_shape("raw_variances", raw_variances, "means.shape", *means.shape)
    expect_shape("prior_logits", prior_logits, "[mixtures, components]", *means.shape[:2])


def expect_constant(name: str, number: float) -> None:
    """Check that a constant is a finite number that is not negative."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{name} is {number!r}, expected a number.")
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name} is {number}, expected a finite number that is not negative.")


def validate_numbers(call: AttentionCall) -> None:
    """Check the types of constants and flags, whose values are known before the computation."""
    for name in ("causal", "normalize", "output_final_state", "output_normalizer", "correlate"):
        if not isinstance(getattr(call, name), bool):
            raise ValueError(f"{name} is {getattr(call, name)!r}, expected True or False.")
    for name in ("eps", "variance_floor"):
        expect_constant(name, getattr(call, name))
    if call.correlate and call.normalize:
        raise ValueError(
            "correlate is given with normalize=True, but the weights of correlated routes may sum to 0 or less; use "
            "normalize=False."
        )


def validate_call(call: AttentionCall, sequence_ids: Tensor | None) -> None:
    """Check that every argument has the shape, dtype and device that the other arguments imply."""
    query, key, value = call.query, call.key, call.value
    validate_numbers(call)
    tensors = {name: getattr(call, name) for name in (*GIVEN, *OPTIONAL)} | {"sequence_ids": sequence_ids}
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and (x is not None or name in GIVEN):
            raise ValueError(f"{name} is {type(x).__name__}, expected a tensor.")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}, expected [batch, heads, length, dim].")
        expect_floating(name, x)
    batch, query_heads, _, routing_dim = query.shape
    _, key_heads, key_length, _ = key.shape
    expect_shape(
        "key", key, "[batch, key_value_heads, key_length, routing_dim]", batch, key_heads, key_length, routing_dim
    )
    expect_shape(
        "value", value, "[batch, key_value_heads, key_length, value_dim]", batch, key_heads, key_length, value.shape[3]
    )
    validate_mixture(call.means, call.raw_variances, call.prior_logits, routing_dim)
    mixtures, components = call.prior_logits.shape
    if mixtures % key_heads != 0 or query_heads % mixtures != 0:
        raise ValueError(
            f"query has {query_heads} heads, means {mixtures} mixtures, key and value {key_heads} heads; expected the "
            "heads of key and value to divide the mixtures, and the mixtures to divide the heads of query."
        )
    if call.correlate and components < 2:
        raise ValueError(
            "correlate is given with one component, beside which no token can prefer anything; use 2 or more."
        )
    for name in OPTIONAL:
        x = getattr(call, name)
        if x is not None:
            expect_floating(name, x)
            if x.ndim != 3 or mixtures % x.shape[1] != 0:
                raise ValueError(
                    f"{name} has shape {list(x.shape)}, expected [batch, h, key_length] with h dividing the {mixtures} "
                    "mixtures."
                )
            expect_shape(name, x, "[batch, h, key_length]", batch, x.shape[1], key_length)
    if call.initial_state is not None:
        expect_pair("initial_state", call.initial_state)
        S, z = call.initial_state
        tensors |= {"initial_state S": S, "initial_state z": z}
        layout, sizes, advice = "[batch, mixtures, components", (batch, mixtures), "Was it written by another model?"
        if has_states_per_sequence(call):
            layout, sizes = "[batch, sequences, mixtures, components", (batch, S.shape[1], mixtures)
            if sequence_ids is None:
                advice = "Only packed sequences have a state each: pass sequence_ids, too."
                layout, sizes = "[batch, mixtures, components", (batch, mixtures)
        expect_shape("initial_state S", S, f"{layout}, value_dim]", *sizes, components, value.shape[3], advice=advice)
        expect_shape("initial_state z", z, f"{layout}]", *sizes, components, advice=advice)
    expect_one_device(tensors.items())
    validate_mode(call, sequence_ids)


def validate_mode(call: AttentionCall, sequence_ids: Tensor | None) -> None:
    """Check that a causal or bidirectional call has only arguments that it can use."""
    batch, _, query_length, _ = call.query.shape
    key_length = call.key.shape[2]
    if call.output_normalizer and not call.normalize:
        raise ValueError(
            "output_normalizer is given with normalize=False, where nothing is divided by it; use normalize=True."
        )
    if call.causal or sequence_ids is not None:
        mode = "causal=True" if call.causal else "sequence_ids"
        if query_length != key_length:
            raise ValueError(
                f"{mode} needs queries and keys of one length, got query length {query_length} and key length "
                f"{key_length}; cross-attention is causal=False without sequence_ids."
            )
    if sequence_ids is not None:
        expect_shape("sequence_ids", sequence_ids, "[batch, length]", batch, key_length)
        if sequence_ids.is_floating_point() or sequence_ids.dtype == torch.bool:
            raise ValueError(f"sequence_ids has dtype {sequence_ids.dtype}, expected integers.")
    if call.delta_strength is not None and (call.normalize or not call.causal):
        raise ValueError(
            "delta_strength is given with normalize=True or causal=False. The delta rule corrects a plain sum in the order of "
            "the tokens; use normalize=False and causal=True."
        )
    if not call.causal:
        if call.log_decay is not None:
            raise ValueError("log_decay is given with causal=False, but forgetting has a direction; use causal=True.")
        has_state = call.initial_state is not None or call.output_final_state
        if sequence_ids is not None and has_state and not has_states_per_sequence(call):
            raise ValueError(
                "initial_state or output_final_state is given with sequence_ids and causal=False, where each packed "
                "sequence has a state of its own; drop it, or give an initial_state [batch, sequences, ...] (zeros will do)."
            )
