# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
One step of an engine with continuous batching. The tokens of many sequences follow each other, each sequence has a slot with
its memory, and some sequences begin with this step.

Sequences that continue by one token are the rows of one group. All other sequences are packed: they follow each other in the one
row of a second group, as the operator takes them. Layers with a window take rows: sequences of similar lengths become the rows
of a group, padded to the longest of them. Padding neither writes nor forgets, so each row gives the result of the sequence alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.layout import Layout
from ..ops.attention.packed import PackedSequences, free_tokens, similar_lengths


class StepGroup(NamedTuple):
    """
    Sequences that run through a layer as one batch.

    Args:
        tokens (`torch.LongTensor` of shape `(rows, length)`): places among the tokens of the step; any place at padding.
        layout ([`Layout`]): padding, which stands to the left, or packed sequences. The layers share the values that they
            compute from it.
        positions (`torch.LongTensor` of shape `(rows, length)`): positions of the tokens in their sequences; any position at
            padding.
        slots (`torch.LongTensor` of shape `(sequences,)` or `None`): the slot of each sequence; `None` if nothing has to be
            remembered.
        is_fresh (`bool`): whether the rows begin here. Their slots hold the state of other sequences, and are not read.
        fresh_slots (`torch.LongTensor`, *optional*): among packed sequences, the slots of those that begin here. They have to be
            empty before they are read.
    """

    tokens: Tensor
    layout: Layout
    positions: Tensor
    slots: Tensor | None
    is_fresh: bool
    fresh_slots: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """From `(tokens, ...)` to `(rows, length, ...)`."""
        return x[self.tokens]

    def put(self, rows: Tensor, output: Tensor) -> None:
        """Write the real tokens of `(rows, length, ...)` to their places in `(tokens, ...)`."""
        padding_mask = self.layout.padding_mask
        if padding_mask is None:
            output[self.tokens.flatten()] = rows.flatten(0, 1).to(output.dtype)
        else:
            output[self.tokens[padding_mask]] = rows[padding_mask].to(output.dtype)


def group_step(
    lengths: Sequence[int],
    contexts: Sequence[int],
    slots: Tensor | None,
    device: torch.device | str = "cpu",
    packed: bool = False,
) -> list[StepGroup]:
    """
    The groups of a step.

    Args:
        lengths (`Sequence[int]`): number of tokens of each sequence in this step, in the order of the tokens.
        contexts (`Sequence[int]`): number of tokens of each sequence before this step.
        slots (`torch.Tensor` of shape `(sequences,)`, *optional*): the slot of each sequence.
        device (`torch.device` or `str`): device of the tokens.
        packed (`bool`, *optional*, defaults to `False`): whether the layers take packed sequences, which layers with a window
            do not.

    Returns:
        `list[StepGroup]`: every sequence with at least one token is in exactly one group. Sequences that continue by one
        token, the usual case, are one group without padding.
    """
    starts, place = [], 0
    for length in lengths:
        starts.append(place)
        place += length

    def kind(sequence: int) -> tuple[bool, bool]:
        return contexts[sequence] == 0, lengths[sequence] == 1

    if packed and slots is not None:
        present = [i for i, length in enumerate(lengths) if length > 0]
        alone = [i for i in present if kind(i) == (False, True)]
        others = [i for i in present if kind(i) != (False, True)]
        made = [(members, make) for members, make in ((alone, make_group), (others, pack_group)) if members]
        return [make(members, starts, lengths, contexts, slots, device) for members, make in made]
    members = similar_lengths(lengths, kind, free_tokens(device))
    return [make_group(sequences, starts, lengths, contexts, slots, device) for sequences in members]


def make_group(
    sequences: list[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    contexts: Sequence[int],
    slots: Tensor | None,
    device: torch.device | str,
) -> StepGroup:
    """The group of some sequences, the longest first."""
    start = torch.tensor([starts[sequence] for sequence in sequences])
    length = torch.tensor([lengths[sequence] for sequence in sequences])
    longest, shortest = lengths[sequences[0]], lengths[sequences[-1]]
    # Below zero at padding
    within = torch.arange(longest) - (longest - length)[:, None]
    context = torch.tensor([contexts[sequence] for sequence in sequences])
    tokens, positions = ((x[:, None] + within.clamp(min=0)).to(device, non_blocking=True) for x in (start, context))
    padding_mask = (within >= 0).to(device, non_blocking=True) if shortest < longest else None
    if slots is not None:
        slots = slots[torch.tensor(sequences).to(slots.device, non_blocking=True)].long()
    layout = Layout(len(sequences), longest, padding_mask, has_gaps=False)
    return StepGroup(tokens, layout, positions, slots, contexts[sequences[0]] == 0)


def pack_group(
    sequences: list[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    contexts: Sequence[int],
    slots: Tensor,
    device: torch.device | str,
) -> StepGroup:
    """The group of some sequences, packed into one row."""
    counts = [lengths[sequence] for sequence in sequences]
    places = [
        torch.arange(first[sequence], first[sequence] + lengths[sequence])
        for first in (starts, contexts)
        for sequence in sequences
    ]
    tokens, positions = (
        torch.cat(part)[None].to(device, non_blocking=True) for part in (places[: len(counts)], places[len(counts) :])
    )
    slots = slots[torch.tensor(sequences).to(slots.device, non_blocking=True)].long()
    fresh = [i for i, sequence in enumerate(sequences) if contexts[sequence] == 0]
    fresh_slots = slots[torch.tensor(fresh).to(slots.device, non_blocking=True)] if fresh else None
    layout = Layout(1, tokens.shape[1], sequences=PackedSequences([counts], tokens.device))
    return StepGroup(tokens, layout, positions, slots, False, fresh_slots)
