# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The layout of a call: which tokens are padding, which tokens belong to the same packed sequence, and the position of each
token in its sequence.

Padding may stand anywhere in a row (left, right, in between). Packed sequences are given in one of three ways: `seq_idx`,
`cu_seq_lens_q`, or `position_ids` that start anew. A model computes the layout once, as a [`Layout`], and passes it to all
of its layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_tracing

from ..compat import sequences_are_sharded
from ..ops.window.plan import WindowPlan, padding_first, plan_window, spread_index


class Layout:
    """
    The layout of the tokens of one call. Values that depend on the layout alone are computed when the first layer needs
    them, and kept for the other layers.

    Args:
        batch_size (`int`): number of rows.
        length (`int`): number of tokens per row.
        padding_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at real tokens; `None` if all are
            real.
        sequence_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): packed sequences, as runs of equal numbers
            over the real tokens; `None` if each row is one sequence.
        has_gaps (`bool`, *optional*): whether padding may stand between real tokens; by default the padding mask decides.
        row (`gma_hf.parallel.row.Row`, *optional*): the whole rows, if these tokens are the part of one process.
        sequences (`PackedSequences`, *optional*): instead of `sequence_ids`, the lengths of the packed sequences of one row,
            each of which continues a history of its own. Layers with a window do not take them.

    Attributes:
        ends_at_last (`bool`): whether padding stands to the left of all real tokens, perhaps after [`Layout.sort`].
    """

    def __init__(
        self,
        batch_size: int,
        length: int,
        padding_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        has_gaps: bool | None = None,
        row: Any = None,
        sequences: Any = None,
    ):
        self.batch_size = batch_size
        self.length = length
        self.padding_mask = padding_mask
        self.sequence_ids = sequence_ids
        self.row = row
        self.sequences = sequences
        self.has_gaps = padding_mask is not None and (may_have_gaps(padding_mask) if has_gaps is None else has_gaps)
        # In `order`, padding stands to the left
        self.ends_at_last = self.has_gaps or (padding_mask is not None and bool(padding_mask[:, -1:].all()))
        self._known: dict[Any, Any] = {}
        self._is_complete = False

    def complete(
        self,
        windows: list[tuple[int, int]],
        causal: bool,
        dtype: torch.dtype,
        device: torch.device,
        output_history: bool,
    ) -> None:
        """
        Compute now all values that layers will need, and keep no values that layers compute later: a traced layer must not
        change the values that other layers see.

        Args:
            windows (`list[tuple[int, int]]`): sizes and numbers of sink tokens of the windows.
            causal, dtype, device, output_history: see [`Layout.window`].
        """
        if self.padding_mask is not None:
            self.is_missing(1), self.is_missing(2), self.write_weight, self.sorted_padding_mask, self.inverse
        self.sorted_sequence_ids  # noqa: B018
        # A symbolic length (torch.export) is no int, and the graph must not depend on its value: each layer computes its own
        # plan
        for window_size, num_sinks in windows if isinstance(self.length, int) else ():
            self.window(window_size, num_sinks if causal else 0, causal, dtype, device, output_history)
        self._is_complete = True

    @property
    def is_plain(self) -> bool:
        """Whether all tokens are real and each row is one sequence."""
        return self.padding_mask is None and self.sequence_ids is None and self.sequences is None

    def once(self, name: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute()` under a name. It is computed the first time only."""
        if name in self._known:
            return self._known[name]
        value = compute()
        if not self._is_complete:
            self._known[name] = value
        return value

    @property
    def write_weight(self) -> Tensor | None:
        """Write weights `(batch, 1, length)` in float32: 0 at padding and 1 elsewhere; `None` without padding."""
        if self.padding_mask is None:
            return None
        return self.once("write_weight", lambda: self.padding_mask[:, None].to(torch.float32))

    def is_missing(self, dim: int) -> Tensor:
        """`True` at padding, with an additional dimension of size 1 at `dim`."""
        return self.once(("is_missing", dim), lambda: ~self.padding_mask.unsqueeze(dim))

    @property
    def order(self) -> Tensor | None:
        """
        The order `(batch, length)` in which padding stands to the left of all real tokens; `None` if no token has to move.
        """
        if not self.has_gaps:
            return None
        return self._orders[0]

    @property
    def inverse(self) -> Tensor | None:
        """The inverse of `order`."""
        return self._orders[1] if self.has_gaps else None

    @property
    def _orders(self) -> tuple[Tensor, Tensor]:
        return self.once("orders", lambda: padding_first(self.padding_mask))

    def sort(self, x: Tensor, dim: int) -> Tensor:
        """`x` with its tokens along `dim` in `order`."""
        return x if self.order is None else self._take("order", self.order, x, dim)

    def unsort(self, x: Tensor, dim: int) -> Tensor:
        """`x` with its tokens along `dim` moved from `order` to their own places."""
        return x if self.order is None else self._take("inverse", self.inverse, x, dim)

    def _take(self, name: Any, order: Tensor, x: Tensor, dim: int) -> Tensor:
        """The tokens of `x` in an order `(batch, number)` with a name."""
        # Symbolic sizes (torch.export) cannot be keys of a dictionary
        if self._is_complete or not all(isinstance(size, int) for size in x.shape):
            return x.gather(dim, spread_index(order, x, dim))
        return x.gather(dim, self.once((name, x.shape, dim), lambda: spread_index(order, x, dim)))

    @property
    def sorted_padding_mask(self) -> Tensor | None:
        """The padding mask in `order`."""
        return self.once("sorted_padding_mask", lambda: self.sort(self.padding_mask, 1))

    @property
    def sorted_sequence_ids(self) -> Tensor | None:
        """The sequence ids in `order`."""
        if self.sequence_ids is None:
            return None
        return self.once("sorted_sequence_ids", lambda: self.sort(self.sequence_ids, 1))

    def window(
        self,
        window_size: int,
        num_sinks: int,
        causal: bool,
        dtype: torch.dtype,
        device: torch.device,
        output_history: bool,
    ) -> WindowPlan:
        """
        The tokens that a window and its memory read, for a call without a past.

        Args:
            window_size (`int`): W.
            num_sinks (`int`): s.
            causal (`bool`): whether a token sees the tokens before it only.
            dtype (`torch.dtype`): precision of the weight of the memory.
            device (`torch.device`): device of the layer.
            output_history (`bool`): whether the layer also returns its state.
        """
        length, size = self.length, window_size
        # A symbolic length (torch.export) is no int, and the graph must not depend on its value
        if not output_history and isinstance(length, int) and length < size:
            size = max(length, 1)

        def compute() -> WindowPlan:
            valid = None if self.padding_mask is None else self.sorted_padding_mask
            ends_at_last = valid is None or self.ends_at_last
            return plan_window(
                self.batch_size, length, valid, self.sorted_sequence_ids, size, window_size, num_sinks, causal, dtype,
                device, ends_at_last=ends_at_last,
            )  # fmt: skip

        return self.once(("window", size, window_size, num_sinks, causal, dtype), compute)

    def take_last(self, x: Tensor, number: int) -> Tensor:
        """
        The last real tokens of `x` `(batch, length, channels)`, as `(batch, number, channels)`. Rows with fewer tokens get
        zeros.
        """

        def compute() -> tuple[Tensor, Tensor]:
            places = torch.arange(self.length, device=x.device)
            end = torch.where(self.padding_mask, places + 1, 0).amax(dim=1, keepdim=True)
            count = self.padding_mask.sum(dim=1, keepdim=True)
            back = torch.arange(number, 0, -1, device=x.device)
            return (end - back).clamp(min=0), (back > count)[..., None]

        places, is_missing = self.once(("last", number), compute)
        return self._take(("last", number), places, x, 1).masked_fill(is_missing, 0)

    def take_kept(self, x: Tensor, plan: WindowPlan) -> Tensor:
        """The tokens of `x` in the window at the end of each row."""
        return self._take(("kept", plan.kept_places.shape[1]), plan.kept_places, x, 1 if x.ndim == 2 else 2)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Layout":
        """The same layout on another device, for layers on this device. The hooks of Accelerate call this method."""
        tensors = [x for x in (self.padding_mask, self.sequence_ids) if x is not None]
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if all(x.device == device for x in tensors):
            return self

        def move() -> Layout:
            moved = [
                None if x is None else x.to(device, non_blocking=non_blocking)
                for x in (self.padding_mask, self.sequence_ids)
            ]
            return Layout(self.batch_size, self.length, *moved, has_gaps=self.has_gaps, row=self.row)

        return self.once(("to", device), move)


def may_have_gaps(padding_mask: Tensor) -> bool:
    """Whether padding stands between real tokens. If the values cannot be read, the answer is `True`."""
    if is_tracing(padding_mask):
        return True
    begins = padding_mask[:, 1:] & ~padding_mask[:, :-1]
    return bool((begins.sum(dim=1) + padding_mask[:, 0] > 1).any())


def expect_tokens(tokens: Tensor, num_dims: int, cache: Any = None) -> None:
    """Check the number of dimensions of the tokens of a call, and that there are tokens; otherwise a `ValueError`."""
    if tokens.ndim != num_dims or (not is_tracing(tokens) and 0 in tokens.shape[:2]):
        behind = "" if cache is None else (
            f" The cache has seen {int(cache.get_seq_length())} tokens, and `generate` takes the whole text: these, and at least one new token."
        )  # fmt: skip
        shape = tuple(tokens.shape)
        raise ValueError(
            f"The tokens have shape {shape}, expected {num_dims} dimensions (batch, length, ...), none of them 0.{behind}"
        )


def expect_whole_sequences() -> None:
    """
    Refuse processes that have a part of every sequence each. The memory would start anew with each part, and outputs and
    gradients would be wrong without any message.

    Raises:
        ValueError: under context or sequence parallelism.
    """
    if sequences_are_sharded():
        raise ValueError(
            "Context parallelism and sequence parallelism cut every sequence over processes, and the memory of a GMA layer "
            "would start anew in each of them. Set `cp_size` and `sp_size` to 1. To share sequences among processes use "
            "`context_parallel_size` of `GMATrainer`, or `gma_hf.context_parallel()` in a training loop of your own."
        )


def find_sequence_ids(
    batch_size: int,
    length: int,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor | None:
    """
    Number the packed sequences of each row.

    Args:
        batch_size (`int`): number of rows.
        length (`int`): number of tokens per row.
        padding_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at real tokens.
        position_ids (`torch.Tensor` of shape `(batch or 1, length)`, *optional*): positions. A sequence starts where the
            position of a real token does not continue the position of the real token before it.
        seq_idx (`torch.Tensor` of shape `(batch or 1, length)`, *optional*): number of the sequence of each token.
        cu_seq_lens (`torch.Tensor` of shape `(num_sequences + 1,)`, *optional*): boundaries of the sequences of one row.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: the numbers; `None` if each row is one sequence.

    Raises:
        ValueError: for boundaries that do not divide the tokens, and for a sequence that is not in one piece.
    """
    announced = next((tensor for tensor in (seq_idx, cu_seq_lens, position_ids) if tensor is not None), None)
    if announced is None or length < 2:
        return None
    device = announced.device
    index = torch.arange(length, device=device).expand(batch_size, -1)
    if padding_mask is None:
        previous = index - 1
        is_real = torch.ones_like(index, dtype=torch.bool)
    else:
        is_real = padding_mask.to(device)
        last_real = torch.where(is_real, index, -1).cummax(dim=1).values
        previous = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)

    if seq_idx is None and cu_seq_lens is not None:
        if batch_size != 1:
            raise ValueError(
                f"`cu_seq_lens_q` describes sequences packed into one row, got a batch of {batch_size} rows. Flatten the "
                "batch, or pass `seq_idx` or `position_ids`."
            )
        _expect_boundaries(cu_seq_lens, length)
        seq_idx = torch.searchsorted(cu_seq_lens[1:].contiguous(), index[:1].to(cu_seq_lens.dtype), right=True)

    announced = _expand_rows(seq_idx if seq_idx is not None else position_ids, batch_size, length)
    step = announced - announced.gather(1, previous.clamp(min=0))
    if seq_idx is not None:
        continues = step == 0
    else:
        # Positions may count the padding in between or not: both continue the same sequence
        continues = (step >= 1) & (step <= index - previous)
    starts = is_real & (previous >= 0) & ~continues
    if not is_tracing(starts):
        if not bool(starts.any()):
            return None
        if seq_idx is not None:
            _expect_whole_sequences(announced, is_real, starts)
    return starts.long().cumsum(dim=1)


def count_positions(
    batch_size: int,
    length: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    seen_tokens: int | Tensor = 0,
) -> Tensor:
    """
    The position of each token in its own sequence. Padding does not count.

    Args:
        batch_size (`int`): number of rows.
        length (`int`): number of current tokens per row.
        device (`torch.device`): device of the result.
        attention_mask (`torch.Tensor` of shape `(batch, seen + length)` or `(batch, length)`, *optional*): nonzero at real
            tokens.
        sequence_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): packed sequences.
        seen_tokens (`int` or `torch.Tensor`): number of tokens in the cache.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: the positions; `(1, length)` if all rows have the same positions.
    """
    if attention_mask is None and sequence_ids is None:
        return (torch.arange(length, device=device) + seen_tokens)[None]
    if attention_mask is None:
        count = torch.arange(1, length + 1, device=device).expand(batch_size, -1) + seen_tokens
    else:
        count = (attention_mask != 0).long().cumsum(dim=1)
        covers_cache = attention_mask.shape[1] > length
        count = count[:, attention_mask.shape[1] - length :] + (0 if covers_cache else seen_tokens)
    positions = count - 1
    if sequence_ids is not None:
        starts = torch.diff(sequence_ids, dim=1, prepend=sequence_ids[:, :1]) != 0
        positions = positions - torch.where(starts, positions, 0).cummax(dim=1).values
    return positions.clamp(min=0)


def same_sequence_mask_function(sequence_ids: Tensor):
    """A mask function for `transformers.masking_utils` that keeps packed sequences apart."""
    last = sequence_ids.shape[1] - 1

    def same_sequence(batch_idx, head_idx, q_idx, kv_idx):
        # A static cache is longer than the sequences; causality masks the rest
        return sequence_ids[batch_idx, q_idx] == sequence_ids[batch_idx, kv_idx.clamp(max=last)]

    return same_sequence


def _expect_boundaries(cu_seq_lens: Tensor, length: int) -> None:
    """Check that boundaries begin at 0, increase, and end with the last token."""
    if is_tracing(cu_seq_lens):
        return
    lengths = cu_seq_lens.diff()
    if cu_seq_lens.ndim != 1 or cu_seq_lens[0] != 0 or cu_seq_lens[-1] != length or bool((lengths < 0).any()):
        raise ValueError(
            f"`cu_seq_lens_q` must begin with 0, increase, and end with the number of tokens, {length}; got {cu_seq_lens.tolist()}."
        )


def _expect_whole_sequences(seq_idx: Tensor, is_real: Tensor, starts: Tensor) -> None:
    """Check that no number comes back after another: its sequence would start anew."""
    numbers = torch.where(is_real, seq_idx, seq_idx.gather(1, is_real.to(torch.uint8).argmax(dim=1, keepdim=True)))
    num_distinct = (numbers.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1) + 1
    if bool((starts.sum(dim=1) + 1 > num_distinct).any()):
        raise ValueError(
            "`seq_idx` returns to the number of an earlier sequence. The tokens of a sequence must stand side by side: sort them, or "
            "give every sequence a number of its own."
        )


def _expand_rows(tensor: Tensor, batch_size: int, length: int) -> Tensor:
    if tensor.ndim != 2 or tensor.shape[0] not in (1, batch_size) or tensor.shape[1] != length:
        raise ValueError(
            f"`position_ids` and `seq_idx` must have shape ({batch_size}, {length}) or (1, {length}), "
            f"got {tuple(tensor.shape)}."
        )
    return tensor.long().expand(batch_size, -1)
