# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The layout of whole rows, of which every process has a part. Padding and packed sequences need a few bytes per token, so all
processes gather them once per call. Then each process knows, without a further message, which sequence crosses a border, how
many of its tokens are before the border, and which tokens of other processes a window still sees.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import is_tracing

from ..modeling.layout import Layout, count_positions, find_sequence_ids
from ..ops.window.plan import count_written, padding_first
from .bidirectional import around, read_around_window, read_both_sides
from .collectives import gather_numbers, gather_tokens
from .context import NO_COMPILER, ContextParallel
from .memory import convolution_before, last_history, state_before, window_before
from .selection import last_real, take
from .softmax import gather_keys, softmax_attention


POSITIONS, NUMBERS = 1, 2  # what announces packed sequences: `position_ids` or `seq_idx`


class Halo(NamedTuple):
    """Which tokens of the processes before this one are the last tokens of the sequence that continues in this part."""

    hops: int  # from how many processes they may come
    order: Tensor | None  # [B, hops * number], by which those that count stand to the right; None if they do
    valid: Tensor | None  # [B, number], which of them exist; None if all do
    ids: Tensor | None  # [B, number], their sequences


class Row:
    """
    The layout of whole rows on one process.

    Args:
        context ([`ContextParallel`]): the processes.
        batch_size (`int`): number of rows.
        lengths (`list[int]`): number of tokens per row of each process.
        padding_mask (`torch.BoolTensor` of shape `(batch, total)`, *optional*): `True` at real tokens; `None` if all are
            real.
        sequence_ids (`torch.LongTensor` of shape `(batch, total)`, *optional*): packed sequences, as in [`Layout`].
        direction (`int`, *optional*, defaults to `1`): -1 in mirrored rows, where the last process is the first.

    Attributes:
        start, end (`int`): the part of this process is `[start, end)`.
        total (`int`): length of the whole rows.
    """

    def __init__(
        self,
        context: ContextParallel,
        batch_size: int,
        lengths: list[int],
        padding_mask: Tensor | None,
        sequence_ids: Tensor | None,
        direction: int = 1,
    ):
        self.context = context
        self.batch_size, self.lengths = batch_size, lengths
        self.padding_mask, self.sequence_ids = padding_mask, sequence_ids
        self.total = sum(lengths)
        self.bounds = [sum(lengths[:rank]) for rank in range(context.size + 1)]
        self.direction = direction
        self.rank = context.rank if direction > 0 else context.size - 1 - context.rank
        self.start, self.end = self.bounds[self.rank], self.bounds[self.rank + 1]
        self._known: dict[Any, Any] = {}

    @property
    def is_plain(self) -> bool:
        """Whether all tokens are real and each row is one sequence."""
        return self.padding_mask is None and self.sequence_ids is None

    def once(self, name: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute()` under a name. It is computed the first time only."""
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    @property
    def mirrored(self) -> "Row":
        """The rows in reverse order: tokens after a part are tokens before the part in them."""

        def compute() -> Row:
            mask, ids = (None if x is None else x.flip(1) for x in (self.padding_mask, self.sequence_ids))
            return Row(self.context, self.batch_size, self.lengths[::-1], mask, ids, -self.direction)

        return self.once("mirrored", compute)

    def counts(self, device: torch.device) -> Tensor:
        """The number of real tokens in the sequence of each token of the part, `(batch or 1, length)`."""
        if self.is_plain:
            return torch.full((1, self.end - self.start), self.total, device=device)

        def compute() -> Tensor:
            count = count_written(self.total, self.padding_mask, self.sequence_ids, False, None, device)
            return self.part(count.expand(-1, self.total))

        return self.once("counts", compute)

    def part(self, x: Tensor | None, rank: int | None = None) -> Tensor | None:
        """The columns of a process; by default of this process."""
        rank = self.rank if rank is None else rank
        return None if x is None else x[:, self.bounds[rank] : self.bounds[rank + 1]]

    def layout(self) -> Layout:
        """The layout of this part."""
        padding_mask = self.part(self.padding_mask)
        if padding_mask is not None and bool(padding_mask.all()):
            padding_mask = None
        return Layout(self.batch_size, self.end - self.start, padding_mask, self.part(self.sequence_ids), row=self)

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the tokens of this part in their sequences. Padding does not count."""
        mask, ids = self.padding_mask, self.sequence_ids
        return self.part(count_positions(self.batch_size, self.total, device, mask, ids))

    # Values for layers

    def convolution_before(self, inputs: Tensor, number: int) -> Tensor:
        """See [`gma_hf.parallel.memory.convolution_before`]."""
        return convolution_before(self, inputs, number)

    def window_before(self, tokens: Any, size: int, num_sinks: int) -> tuple[Any, Tensor]:
        """See [`gma_hf.parallel.memory.window_before`]."""
        return window_before(self, tokens, size, num_sinks)

    def around(self, *args: Any) -> tuple[list[Tensor], Layout]:
        """See [`gma_hf.parallel.bidirectional.around`]."""
        return around(self, *args)

    def read_both_sides(self, *args: Any, **kwargs: Any) -> Any:
        """See [`gma_hf.parallel.bidirectional.read_both_sides`]."""
        return read_both_sides(self, *args, **kwargs)

    def read_around_window(self, *args: Any, **kwargs: Any) -> Tensor:
        """See [`gma_hf.parallel.bidirectional.read_around_window`]."""
        return read_around_window(self, *args, **kwargs)

    def last_history(self, history: Any) -> tuple[Any, int, bool]:
        """
        The state of the last process, on every process; the number of tokens of the rows; and whether the rows are plain.
        """
        return last_history(self, history), self.total, self.is_plain

    def gather_keys(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole rows, for softmax layers."""
        return gather_keys(self, keys, values)

    def softmax(self, *args: Any, **kwargs: Any) -> Tensor:
        """See [`gma_hf.parallel.softmax.softmax_attention`]."""
        return softmax_attention(self, *args, **kwargs)

    def state_before(self, mixture: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See [`gma_hf.parallel.memory.state_before`]."""
        return state_before(self, mixture, *args, **kwargs)

    # Tokens before a border

    def first_id(self, rank: int) -> Tensor:
        """
        The sequence of the first real token of a part, `(batch, 1)`. Without a real token, the sequence that continues from
        the part before.
        """
        ids = self.part(self.sequence_ids, rank)
        if self.padding_mask is None:
            return ids[:, :1]
        return ids.gather(1, self.part(self.padding_mask, rank).to(torch.uint8).argmax(dim=1, keepdim=True))

    @property
    def continues(self) -> Tensor | None:
        """Whether the sequence before the part continues in it, `(batch,)`; `None` if it does in every row."""
        if self.sequence_ids is None or self.rank == 0:
            return None
        before = self.sequence_ids[:, self.start - 1]
        return self.once("continues", lambda: before == self.first_id(self.rank)[:, 0])

    def count_before(self) -> Tensor | int:
        """
        How many real tokens of the sequence that continues are before the part, `(batch,)`, or one number for all rows.
        """
        if self.is_plain:
            return self.start

        def compute() -> Tensor:
            counts = torch.ones(self.batch_size, self.start, dtype=torch.bool, device=self._device)
            if self.padding_mask is not None:
                counts = counts & self.padding_mask[:, : self.start]
            if self.sequence_ids is not None:
                counts = counts & (self.sequence_ids[:, : self.start] == self.first_id(self.rank))
            return counts.sum(dim=1)

        return self.once("count", compute)

    @property
    def _device(self) -> torch.device:
        return (self.padding_mask if self.sequence_ids is None else self.sequence_ids).device

    def last_places(self, rank: int, number: int) -> tuple[Tensor, Tensor]:
        """The places in whole rows of the last real tokens of a part, `(batch or 1, number)`, and which of them exist."""
        start, end = self.bounds[rank], self.bounds[rank + 1]
        if self.padding_mask is None:
            device = None if self.sequence_ids is None else self._device
            places = torch.arange(end - number, end, device=device)[None]
            return places.clamp(min=start), places >= start
        return self.once(("last", rank, number), lambda: last_real(self.part(self.padding_mask, rank), number, start))

    def take_last(self, x: Tensor, dim: int, number: int) -> Tensor:
        """The last real tokens of this part; zeros if a row has fewer."""
        length = x.shape[dim]
        if self.padding_mask is not None:
            places, exists = self.last_places(self.rank, number)
            return take(x, dim, places - self.start, exists)
        if length >= number:
            return x.narrow(dim, length - number, number)
        shape = [number - length if i == dim else n for i, n in enumerate(x.shape)]
        return torch.cat([x.new_zeros(shape), x], dim=dim)

    def hops(self, number: int) -> int:
        """
        The largest number of processes that the last real tokens before a part may come from. It is the same on every
        process.
        """

        def compute() -> int:
            counts = [self.lengths]
            if self.padding_mask is not None:
                parts = [self.part(self.padding_mask, rank).sum(dim=1) for rank in range(len(self.lengths))]
                counts = torch.stack(parts, dim=1).tolist()
            most = 1
            for row in counts:
                for rank in range(2, len(row)):
                    needed = 1
                    while needed < rank and sum(row[rank - needed : rank]) < number:
                        needed += 1
                    most = max(most, needed)
            return most

        return self.once(("hops", number), compute)

    def halo(self, number: int, same_sequence: bool = True) -> Halo:
        """Which of the last tokens from the processes before this one count: the tokens of the sequence that continues."""

        def compute() -> Halo:
            hops = self.hops(number)
            if self.is_plain and self.start >= number and hops == 1:
                return Halo(hops, None, None, None)
            flags, ids = [], []
            for distance in range(hops, 0, -1):
                if self.rank < distance:
                    flags.append(torch.zeros(1, number, dtype=torch.bool))
                    ids.append(None if self.sequence_ids is None else self.sequence_ids[:, :1].expand(-1, number))
                    continue
                places, valid = self.last_places(self.rank - distance, number)
                if self.sequence_ids is not None:
                    taken = self.sequence_ids.gather(1, places.expand(self.batch_size, -1))
                    ids.append(taken)
                    if same_sequence:
                        valid = valid & (taken == self.first_id(self.rank))
                flags.append(valid)
            device = None if self.is_plain else self._device
            valid = torch.cat([x.to(device).expand(self.batch_size, -1) for x in flags], dim=1)
            order, taken = None, None if self.sequence_ids is None else torch.cat(ids, dim=1)
            if hops > 1:
                order = padding_first(valid)[0][:, -number:]
                valid = valid.gather(1, order)
                taken = None if taken is None else taken.gather(1, order)
            return Halo(hops, order, valid, taken)

        return self.once(("halo", number, same_sequence), compute)

    def sink_places(self, rank: int, number: int) -> tuple[Tensor, Tensor]:
        """The places of the first real tokens of the last sequence of a part, `(batch, number)`, and which of them exist."""
        part = self.lengths[rank]

        def compute() -> tuple[Tensor, Tensor]:
            device = None if self.is_plain else self._device
            counts = torch.ones(self.batch_size, part, dtype=torch.bool, device=device)
            if self.padding_mask is not None:
                counts = counts & self.part(self.padding_mask, rank)
            if self.sequence_ids is not None:
                ids = self.part(self.sequence_ids, rank)
                counts = counts & (ids == ids[:, -1:])
            nth = torch.arange(1, number + 1, device=counts.device).expand(self.batch_size, -1)
            places = torch.searchsorted(counts.long().cumsum(dim=1), nth.contiguous())
            return places.clamp(max=part - 1) + self.bounds[rank], places < part

        return self.once(("sinks", rank, number), compute)


def gather_row(
    context: ContextParallel,
    batch_size: int,
    length: int,
    device: torch.device,
    *,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    anchor: Tensor,
) -> Row:
    """
    Gather the layout of whole rows.

    Args:
        context ([`ContextParallel`]): the processes.
        batch_size (`int`), length (`int`): shape of the part.
        device (`torch.device`): device of the tokens.
        padding_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at real tokens of the part.
        position_ids, seq_idx (`torch.Tensor` of shape `(batch or 1, length)`, *optional*): values of the part, see
        [`find_sequence_ids`].
        anchor (`torch.Tensor`): any tensor of the call, which tells whether the call is traced.

    Raises:
        ValueError: if the parts of the processes do not belong together.
    """
    if is_tracing(anchor):
        raise ValueError(NO_COMPILER)
    announced = position_ids if seq_idx is None else seq_idx
    kind = NUMBERS if seq_idx is not None else POSITIONS if position_ids is not None else 0
    num_rows = 0 if announced is None else announced.shape[0]
    numbers = [batch_size, length, int(padding_mask is not None), kind, num_rows]
    given = gather_numbers(context.group, numbers, device)
    lengths = [one[1] for one in given]
    names = ("rows", "tokens", "a padding mask", "`position_ids` (1) or `seq_idx` (2)", "rows of these")
    for place in (0, 3, 4):
        if len({one[place] for one in given}) > 1:
            raise ValueError(
                f"The processes of the context-parallel group were given different inputs: {names[place]} "
                f"{[one[place] for one in given]}. Give every process the same batch, and let `context.split(batch)` cut it."
            )
    if min(lengths) < 1:
        raise ValueError(
            f"The processes have {lengths} tokens of each row, but every process needs at least one. Use longer sequences, or "
            f"fewer than {context.size} processes for a sequence."
        )
    if any(one[2] for one in given):
        if padding_mask is None:
            padding_mask = torch.ones(batch_size, length, dtype=torch.bool, device=device)
        padding_mask = gather_tokens(context.group, padding_mask.to(torch.uint8), 1, lengths)[0].bool()
        if bool(padding_mask.all()):
            padding_mask = None
    sequence_ids = None
    if announced is not None:
        announced = gather_tokens(context.group, announced.to(device).long(), 1, lengths)[0]
        kinds = {"seq_idx": announced} if kind == NUMBERS else {"position_ids": announced}
        sequence_ids = find_sequence_ids(batch_size, sum(lengths), padding_mask, **kinds)
    return Row(context, batch_size, lengths, padding_mask, sequence_ids)
