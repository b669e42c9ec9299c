# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a layer keeps between calls: a [`MemoryState`] of the tokens, [`KeptValues`] of the parameters, their [`Owner`]. The functions below
move tokens into a window and its memory: they join tokens with a history, shift a window by a step, and choose what to keep.
"""

import hashlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import is_tracing

from ..compat import version_of
from ..ops.window.plan import WindowPlan, first_tokens, last_tokens, take_tokens, token_dim
from .layout import Layout


if TYPE_CHECKING:
    from ..ops.attention.slots import Slots

SAMPLES = 256  # numbers of each parameter that enter the fingerprint
NATIVE = "a native model"  # the kind of an [`Owner`]


class MemoryState(NamedTuple):
    """
    The state of a layer between calls. Its size does not depend on the number of seen tokens.

    With a window, S and z do not contain the last W tokens yet, and never contain the first s tokens (sink tokens), which
    have their own place after they have left the window. Rows with fewer tokens have invalid tokens on the left.
    """

    state: Tensor  # S [batch, heads, components, value_dim], in float32
    normalizer: Tensor  # z [batch, heads, components], in float32
    keys: Tensor | None = None  # [batch, key_value_heads, W, head_dim]
    values: Tensor | None = None  # [batch, key_value_heads, W, value_dim]
    valid: Tensor | None = (
        None  # [batch, W], True at the tokens that exist; None if all W and all s are known to exist
    )
    routing_keys: Tensor | None = None  # [batch, key_value_heads, W, routing_dim], where they are not the keys
    write_weight: Tensor | None = None  # [batch, h, W], of the tokens still to be written
    log_decay: Tensor | None = None  # [batch, h, W]
    sink_keys: Tensor | None = None  # [batch, key_value_heads, s, head_dim]
    sink_values: Tensor | None = None  # [batch, key_value_heads, s, value_dim]
    sink_valid: Tensor | None = None  # [batch, s]; None where `valid` is
    # [batch], how many tokens are in S and z; if it was not kept, b must be 0. Where all rows are known to have as many, a plain
    # number: how many tokens have left the window and the sinks, below zero while there is room
    count: Tensor | int | None = None
    convolution: Tensor | None = None  # [batch, kernel_size - 1, channels], the last inputs of the short convolution
    # If the first dimension of S and z is a slot: the slots of the rows or packed sequences, which a call advances in place
    slots: "Slots | None" = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        """The state with `function` applied to every tensor."""
        return MemoryState(*(function(x) if isinstance(x, Tensor) else x for x in self))


class Owner:
    """
    What fills a cache layer: a native model, or the attention module of a converted model. It is unknown after it was deleted or the
    layer was pickled; its kind is known.
    """

    def __init__(self, model: nn.Module | None = None, fingerprint: str | None = None, kind: str | None = None):
        self.model = (lambda: None) if model is None else weakref.ref(model)
        self.fingerprint = fingerprint  # of a cache from a file, until the first call has compared it
        self.kind = kind  # in words

    def __deepcopy__(self, copied: dict) -> "Owner":
        return Owner(self.model(), self.fingerprint, self.kind)

    def __reduce__(self):
        return Owner, (None, self.fingerprint, self.kind)


def take_over(layers: list[Any], model: nn.Module, kind: str) -> None:
    """
    Record in layers of a cache what fills them. Layers that a file or another model has filled must come from the same weights. Of a
    pickled cache, and after the model that filled a cache was deleted, the weights are unknown, and only the kinds are compared.

    Args:
        layers (`list[GMACacheLayer]`): the layers of a cache, filled by one owner.
        model (`nn.Module`): the native model, or the converted attention module.
        kind (`str`): what it is, in words.

    Raises:
        ValueError: if a model of another kind or of other weights filled the layers.
    """
    layers = [layer for layer in layers if layer.owner.model() is not model]
    if not layers:
        return
    owner, has_seen_tokens = layers[0].owner, layers[0].has_seen_tokens
    if has_seen_tokens and owner.kind not in (None, kind):
        raise ValueError(
            f"The cache does not fit the model: {owner.kind} filled it, and {kind} got it. Start with a new cache."
        )
    fingerprint, filler = owner.fingerprint, owner.model()
    if fingerprint is None and filler is not None and has_seen_tokens:
        fingerprint = fingerprint_of(filler)
    if fingerprint is not None:
        expect_fingerprint(model, fingerprint, "The cache")
    for layer in layers:
        layer.owner = Owner(model, kind=kind)


def fingerprint_of(model: nn.Module) -> str | None:
    """
    A fingerprint of the weights: models share it only if their weights are the same. It covers the name, the shape, the
    dtype and up to 256 numbers of every parameter.

    Returns:
        `str` or `None`: the fingerprint; `None` if weights are not in memory (offloaded models).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            return None
        values = parameter.detach().flatten()
        values = values[:: max(1, values.numel() // SAMPLES)][:SAMPLES].cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {values.dtype}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def expect_fingerprint(model: nn.Module, fingerprint: str, what: str) -> None:
    """
    Check that a cache belongs to the weights of a model.

    Raises:
        ValueError: if other weights filled the cache.
    """
    found = fingerprint_of(model)
    if found is not None and found != fingerprint:
        raise ValueError(
            f"{what} does not fit the model: other weights, or weights of another dtype, filled the cache. Load the checkpoint that "
            "wrote it, in the same dtype, or process the prompt again."
        )


class KeptValues:
    """
    Values that depend on parameters alone, computed once and kept while the parameters do not change. They belong to the
    state of a layer in a cache, so they do not outlive a text, and threads do not share them.
    """

    def __init__(self):
        self._values = {}

    def get(self, name: Any, parameters: tuple[nn.Parameter, ...], compute: Callable[..., tuple[Tensor, ...]]):
        """
        `compute(*parameters)`, or the value of the last time. Under autograd and in compiled graphs, it is always computed.
        """
        if torch.is_grad_enabled() or is_tracing():
            return compute(*parameters)
        stamp = []
        for parameter in parameters:
            # Changes of parameters of other classes (quantized, sharded, of a function transform) may not be visible
            if type(parameter) is not nn.Parameter or parameter.is_inference():
                return compute(*parameters)
            stamp += [version_of(parameter), parameter.data_ptr(), parameter.dtype]
        known = self._values.get(name)
        if known is None or known[1] != stamp or any(x is not y for x, y in zip(known[0], parameters, strict=True)):
            known = self._values[name] = parameters, stamp, compute(*parameters)
        return known[2]

    @property
    def names(self) -> list:
        """The names of the kept values."""
        return list(self._values)

    def __deepcopy__(self, copied: dict) -> "KeptValues":
        return KeptValues()

    def __reduce__(self):
        return KeptValues, ()


class Tokens(NamedTuple):
    """Tokens as a window and its memory see them."""

    keys: Tensor
    values: Tensor
    routing_keys: Tensor | None  # where they are not the keys
    write_weight: Tensor | None
    log_decay: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """The tokens with `function` applied to every tensor."""
        return Tokens(*(None if x is None else function(x) for x in self))


def is_step(tokens: Tokens, layout: Layout, history: MemoryState | None) -> bool:
    """Whether a call is a decoding step: one real token after a history that keeps the same tensors as this token has."""
    length = tokens.keys.shape[2]
    if history is None or not isinstance(length, int) or length != 1 or not layout.is_plain:
        return False
    kept = (history.routing_keys, history.write_weight, history.log_decay)
    given = (tokens.routing_keys, tokens.write_weight, tokens.log_decay)
    return all((x is None) == (y is None) for x, y in zip(kept, given, strict=True))


def shifted(window: Tensor, new: Tensor, in_front: Tensor | None = None) -> Tensor:
    """A window without its first token and with a new last token, optionally with other tokens before it."""
    dim = token_dim(window)
    kept = last_tokens(window, window.shape[dim] - 1)
    parts = [kept, new] if in_front is None else [in_front, kept, new]
    if window.dtype != new.dtype:
        parts = [x.to(new.dtype) for x in parts]
    return torch.cat(parts, dim=dim)


def leave_window(history: MemoryState) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """
    What happens when the oldest token leaves the window: whether it is written, [B, 1] (`None` if it is written in every
    row), and keys, values and validity of the sink tokens afterwards.
    """
    if history.valid is None:
        return None, (history.sink_keys, history.sink_values, None)
    is_real = first_tokens(history.valid, 1)
    if history.sink_keys is None:
        return is_real, (None, None, None)
    # Sink tokens stand to the right, so there is room as long as the first place is empty
    is_full = first_tokens(history.sink_valid, 1)
    is_sink = is_real & ~is_full
    sinks = []
    for kept, window in (
        (history.sink_keys, history.keys),
        (history.sink_values, history.values),
        (history.sink_valid, history.valid),
    ):
        becomes = is_sink if kept.ndim == 2 else is_sink[:, None, :, None]
        sinks.append(torch.where(becomes, shifted(kept, first_tokens(window, 1).to(kept.dtype)), kept))
    return is_real & is_full, tuple(sinks)


def take_queries(x: Tensor, order: Tensor) -> Tensor:
    """Queries (the last of all tokens) in an order of all tokens. Reads for the history are dropped later."""
    length = x.shape[2]
    past = order.shape[1] - length
    return take_tokens(x, (order[:, past:] - past).clamp(min=0))


def sink_tokens_of(tokens: Tokens, plan: WindowPlan) -> tuple[Tensor | None, ...]:
    """Keys, values, visibility and, for packed sequences, places of the sink tokens."""
    if plan.sink_places.ndim == 3:
        return tokens.keys, tokens.values, plan.sink_visible, plan.sink_places
    return *(take_tokens(x, plan.sink_places) for x in tokens[:2]), plan.sink_visible, None


def join_history(
    tokens: Tokens, layout: Layout, history: MemoryState | None, size: int
) -> tuple[Tokens, Tensor, Tensor | None]:
    """
    The tokens after the tokens of the history (its sink tokens first), or after `size` invalid tokens; which tokens exist;
    and their runs.
    """
    valid, runs = layout.padding_mask, layout.sequence_ids
    batch_size, length = tokens.keys.shape[0], tokens.keys.shape[2]
    if valid is None:
        rows = 1 if history is None else batch_size
        valid = torch.ones(rows, length, dtype=torch.bool, device=tokens.keys.device)
    if runs is not None:
        # The history and padding belong to the first sequence
        first = runs.gather(1, valid.expand(batch_size, -1).to(torch.uint8).argmax(dim=1, keepdim=True))
        runs = torch.cat([first.expand(-1, size), torch.where(valid, runs, first)], dim=1)
    past = MemoryState(None, None) if history is None else with_sinks_in_front(history)

    def join(before: Tensor | None, now: Tensor | None, fill: float = 0.0) -> Tensor | None:
        if now is None and before is None:
            return None
        if now is None:
            now = before.new_full((*before.shape[:2], length), fill)
        if before is None:
            before_shape = [size if dim == token_dim(now) else n for dim, n in enumerate(now.shape)]
            before = now.new_full(before_shape, fill)
        return torch.cat([before.to(now.dtype), now], dim=token_dim(now))

    tokens = Tokens(
        join(past.keys, tokens.keys),
        join(past.values, tokens.values),
        join(past.routing_keys, tokens.routing_keys),
        join(past.write_weight, tokens.write_weight, fill=1.0),
        join(past.log_decay, tokens.log_decay),
    )
    return tokens, join(past.valid, valid, fill=history is not None), runs


def with_sinks_in_front(history: MemoryState) -> MemoryState:
    """
    The window of a history after its sink slots. The fields for the memory are zero in the slots, because sink tokens do not
    enter the memory.
    """
    if history.sink_keys is None:
        return history
    num_sinks = history.sink_keys.shape[2]
    valid = None if history.valid is None else torch.cat([history.sink_valid, history.valid], dim=1)

    def widen(x: Tensor | None) -> Tensor | None:
        return None if x is None else F.pad(x, (*[0, 0] * (x.ndim - 1 - token_dim(x)), num_sinks, 0))

    return history._replace(
        keys=torch.cat([history.sink_keys, history.keys], dim=2),
        values=torch.cat([history.sink_values, history.values], dim=2),
        valid=valid,
        routing_keys=widen(history.routing_keys),
        write_weight=widen(history.write_weight),
        log_decay=widen(history.log_decay),
    )


def new_history(
    layout: Layout,
    tokens: Tokens,
    plan: WindowPlan,
    size: int,
    num_sinks: int,
    state: tuple[Tensor, Tensor],
    count: Tensor | int,
) -> MemoryState:
    """The new state after tokens, with the state of the memory after them."""
    batch_size, num_tokens = tokens.keys.shape[0], tokens.keys.shape[2]
    sinks = ()
    if num_sinks > 0:
        is_sink = plan.kept_sink_valid.expand(batch_size, -1)
        places = plan.kept_sink_places.expand(batch_size, -1)
        sinks = [take_tokens(x, places).masked_fill(~is_sink[:, None, :, None], 0) for x in tokens[:2]]
        sinks = (*sinks, is_sink)
    if plan.kept_places is not None:
        last = tokens.map(lambda x: layout.take_kept(x, plan))
    elif isinstance(num_tokens, int) and num_tokens < size:
        last = tokens.map(lambda x: F.pad(x, (*[0, 0] * (x.ndim - 1 - token_dim(x)), size - num_tokens, 0)))
    else:
        last = tokens.map(lambda x: last_tokens(x, size))
    valid = rows(plan.kept_valid, batch_size)
    others = (last.routing_keys, last.write_weight, last.log_decay)
    return MemoryState(*state, last.keys, last.values, valid, *others, *(sinks or (None,) * 3), count)


def rows(x: Tensor, batch_size: int) -> Tensor:
    """`x` for every row, if there is one row for all."""
    return x if x.shape[0] == batch_size else x.expand(batch_size, *x.shape[1:])
