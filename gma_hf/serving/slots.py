# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The memory of a layer in slots: the state that [`GMACacheLayer`] keeps for a batch, one sequence per slot, in tensors whose
first dimension is the slot. Everything has a fixed size: S and z in float32, the history of the short convolution, and with
a window the keys and values in the window, the sink tokens, and the number of summed tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.cache_gma import counted
from ..modeling.memory_state import KeptValues, MemoryState
from ..ops.attention.slots import Slots
from .steps import StepGroup


IN_PLACE = ("state", "normalizer")  # what the operator advances in the slots
ALIGNMENT = 16  # bytes; every number of a slot lies at a multiple of its own size


class SlotField(NamedTuple):
    """One tensor of a slot: its name, its shape without the slot, its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SlotLayout(NamedTuple):
    """
    The state of one layer for one sequence.

    Args:
        num_heads, num_key_value_heads, num_components, key_dim, value_dim (`int`): sizes of the heads that this process
        computes.
        window_size, num_sink_tokens (`int`): sizes of the window; 0 for none.
        conv_history (`tuple[int, int]`): number of tokens and channels that the short convolution remembers.
        has_write_weight, has_log_decay, has_routing_keys (`bool`): whether tokens in the window keep a write weight, a
        decay, or a separate key for the mixture.
        dtype (`torch.dtype`): dtype of keys and values.
    """

    num_heads: int
    num_key_value_heads: int
    num_components: int
    key_dim: int
    value_dim: int
    window_size: int = 0
    num_sink_tokens: int = 0
    conv_history: tuple[int, int] = (0, 0)
    has_write_weight: bool = False
    has_log_decay: bool = False
    has_routing_keys: bool = False
    dtype: torch.dtype = torch.float32

    def fields(self) -> list[SlotField]:
        """The tensors of a slot, from the dtype with the largest numbers to the smallest."""
        heads, window, sinks = self.num_heads, self.window_size, self.num_sink_tokens
        keys, values = ((self.num_key_value_heads, window, dim) for dim in (self.key_dim, self.value_dim))
        fields = [
            SlotField("state", (heads, self.num_components, self.value_dim), torch.float32),
            SlotField("normalizer", (heads, self.num_components), torch.float32),
        ]
        if window > 0:
            fields.append(SlotField("count", (1,), torch.int32))
            if self.has_write_weight:
                fields.append(SlotField("write_weight", (heads, window), torch.float32))
            if self.has_log_decay:
                fields.append(SlotField("log_decay", (heads, window), torch.float32))
            fields += [SlotField("keys", keys, self.dtype), SlotField("values", values, self.dtype)]
            if self.has_routing_keys:
                fields.append(SlotField("routing_keys", keys, self.dtype))
            if sinks > 0:
                fields.append(SlotField("sink_keys", (keys[0], sinks, keys[2]), self.dtype))
                fields.append(SlotField("sink_values", (keys[0], sinks, values[2]), self.dtype))
        if self.conv_history[0] > 0:
            fields.append(SlotField("convolution", self.conv_history, self.dtype))
        if window > 0:
            fields.append(SlotField("valid", (window,), torch.bool))
            if sinks > 0:
                fields.append(SlotField("sink_valid", (sinks,), torch.bool))
        rest = -sum(field.num_bytes for field in fields) % ALIGNMENT
        return fields if rest == 0 else [*fields, SlotField("unused", (rest,), torch.uint8)]

    @property
    def num_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(field.num_bytes for field in self.fields())


class SlotMemory:
    """
    The memory of the sequences of one group, instead of a layer of a cache. S and z stay in their slots, where the operator
    advances them. Everything else is read from the slots when this object is created, and [`SlotMemory.store`] writes it back.

    Args:
        layout (`SlotLayout`): the content of a slot.
        tensors (`Sequence[torch.Tensor]` of shapes `(slots, ...)`): the slots, in the order of the fields of the layout.
        group ([`StepGroup`]): the sequences. The slots of those that begin here are not read, or emptied before.
        kept ([`KeptValues`], *optional*): values that the layer computed from its parameters, for all steps.

    Attributes:
        history ([`MemoryState`] or `None`): the state to continue from.
        new ([`MemoryState`] or `None`): the state after the group.
    """

    def __init__(
        self,
        layout: SlotLayout,
        tensors: Sequence[Tensor],
        group: StepGroup,
        kept: KeptValues | None = None,
    ):
        self.layout = layout
        self.tensors = dict(zip((field.name for field in layout.fields()), tensors, strict=True)) if tensors else {}
        self.slots = slots = group.slots
        self.kept = KeptValues() if kept is None else kept
        self.history = self.new = None
        if group.fresh_slots is not None:
            for tensor in self.tensors.values():
                tensor.index_fill_(0, group.fresh_slots, 0)
        if not group.is_fresh:
            past = {
                name: tensor if name in IN_PLACE else tensor[slots]
                for name, tensor in self.tensors.items()
                if name != "unused"
            }
            if "count" in past:
                past["count"] = past["count"][:, 0].long()
            self.history = MemoryState(**past, slots=Slots(slots))

    def advance(self, memory: MemoryState, num_tokens: int, is_plain: bool = False) -> None:
        """Take the state after the tokens of the group, with the arguments of [`GMACacheLayer.advance`]."""
        self.new = counted(memory)

    def store(self) -> None:
        """
        Write the new state into the slots.

        Raises:
            RuntimeError: if the state of a layer does not fit its slot.
        """
        if self.slots is None:
            return
        new = {name: value for name, value in self.new._asdict().items() if value is not None and name != "slots"}
        expected = {field.name for field in self.layout.fields()} - {"unused"}
        if new.keys() != expected:
            raise RuntimeError(
                f"A layer remembers {sorted(new)}, but its slots hold {sorted(expected)}. This is a fault of gma_hf."
            )
        for field in self.layout.fields():
            tensor = self.tensors[field.name]
            if field.name != "unused" and new[field.name] is not tensor:
                tensor[self.slots] = new[field.name].reshape(len(self.slots), *field.shape).to(field.dtype)


class SlotCache:
    """A cache of one layer, in the form that [`GMAAttention`] reads."""

    def __init__(self, layer_idx: int, memory: SlotMemory):
        self.layers = {layer_idx: memory}


def run_step(
    groups: Iterable[StepGroup],
    layout: SlotLayout,
    tensors: Sequence[Tensor],
    inputs: Sequence[Tensor],
    output: Tensor,
    attend: Callable[[list[Tensor], StepGroup, SlotMemory], Tensor],
    kept: KeptValues | None = None,
) -> Tensor:
    """
    Run one layer for one step.

    Args:
        groups (`Iterable[StepGroup]`): the groups of the step.
        layout (`SlotLayout`): the content of a slot of the layer.
        tensors (`Sequence[torch.Tensor]`): the slots of the layer.
        inputs (`Sequence[torch.Tensor]` of shapes `(tokens, ...)`): the inputs of the layer for each token.
        output (`torch.Tensor` of shape `(tokens, ...)`): memory for the results.
        attend (`Callable`): from the inputs `(rows, length, ...)` of a group, the group and its memory, which it updates, to
            the results `(rows, length, ...)`.
        kept ([`KeptValues`], *optional*): values that the layer computed from its parameters, for all steps.

    Returns:
        `torch.Tensor`: `output`.
    """
    for group in groups:
        memory = SlotMemory(layout, tensors, group, kept)
        rows = attend([group.take(x) for x in inputs], group, memory)
        memory.store()
        group.put(rows, output)
    return output
