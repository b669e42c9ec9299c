# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Packed sequences, each with its own state: sequence s of a row starts from S_0[s], z_0[s], and ends with S_s, z_s.

    S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T,   z_t likewise with v_t = 1        S_{start of s - 1} = S_0[s]

On a GPU, one launch of a kernel runs all sequences without gradients, where the state of a mixture fits a tile. For any other
call, sequences of similar lengths become the rows of a batch with one state per row, which every backend can run. Padding
stands after the shorter sequences. It does not write (w = 0) and does not forget (a = 1), so the states after the padding are
the states after the last tokens.

The lengths have to be known on the host. If the caller gives `sequence_ids`, the host waits for the device once.
`torch.compile` breaks its graph there.

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], S_0 [B, s, M, C, dv], z_0 [B, s, M, C]
-> output [B, Hq, N, dv], S [B, s, M, C, dv], z [B, s, M, C], D [B, Hq, N].
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Way, explain
from .call import PACKED, WAYS, AttentionCall, AttentionResult, State, run_starts, without_delta_rule
from .fused import needs_gradients


# The largest padding of a row in tokens, and as a share of the longest row; rows with more padding go to another batch
FREE_PADDING, PADDED_SHARE = 16, 0.25
# Padding in all rows of a batch that costs a GPU less time than the launches of one more batch
FREE_TOKENS = 8192
# The kernel runs a sequence chunk by chunk. Sequences that are longer than this run as rows, in segments at the same time
LONGEST = 16384


def similar_lengths(
    lengths: Sequence[int], kind: Callable[[int], tuple] = lambda sequence: (), free_tokens: int = 0
) -> list[list[int]]:
    """
    Group sequences that run as the rows of one batch.

    Args:
        lengths (`Sequence[int]`): number of tokens of each sequence.
        kind (`Callable`, *optional*): the kind of a sequence by its number. All rows of a batch are of one kind.
        free_tokens (`int`, *optional*, defaults to `0`): padding of all rows of a batch together that is allowed in any case.

    Returns:
        `list[list[int]]`: numbers of sequences, one list per batch, the longest sequences first. Sequences without tokens
        are left out.
    """
    order = [sequence for sequence, length in enumerate(lengths) if length > 0]
    order.sort(key=lambda sequence: (kind(sequence), -lengths[sequence]))
    batches: list[list[int]] = []
    padding = 0
    for sequence in order:
        if batches and kind(sequence) == kind(batches[-1][0]):
            longest = lengths[batches[-1][0]]
            missing = longest - lengths[sequence]
            if missing <= max(FREE_PADDING, PADDED_SHARE * longest) or padding + missing <= free_tokens:
                padding += missing
                batches[-1].append(sequence)
                continue
        padding = 0
        batches.append([sequence])
    return batches


def free_tokens(device: torch.device | str) -> int:
    """`free_tokens` of [`similar_lengths`] on a device."""
    return FREE_TOKENS if torch.device(device).type == "cuda" else 0


class PackedBatch(NamedTuple):
    """
    Sequences of similar lengths as the rows of a batch.

    Args:
        sequences (`torch.LongTensor` of shape `(rows,)`): numbers of the sequences, counted through all rows of the call.
        tokens (`torch.LongTensor` of shape `(rows, longest)`): places of the tokens among the tokens of all rows of the
            call. Padding repeats the last token.
        is_real (`torch.BoolTensor` of shape `(rows, longest)`, *optional*): `False` at padding; `None` without padding.
        real (`torch.LongTensor` of shape `(real tokens,)`): places of the real tokens in the batch.
    """

    sequences: Tensor
    tokens: Tensor
    is_real: Tensor | None
    real: Tensor


class PackedHistories(NamedTuple):
    """
    Packed sequences of one row, each behind the last tokens of its history. All fields are places of tokens.

    Args:
        joined (`torch.LongTensor` of shape `(joined tokens,)`): the joined row, among the tokens of all histories (one
            sequence after the other) and then the tokens of the call.
        tokens (`torch.LongTensor` of shape `(tokens,)`): the tokens of the call, among the joined row.
        last (`torch.LongTensor` of shape `(sequences, number)`): the new histories, among the joined row.
    """

    joined: Tensor
    tokens: Tensor
    last: Tensor


class PackedSequences:
    """
    The lengths of packed sequences, and what follows from them. Everything is computed once: an engine makes one for a step,
    and all layers use it.

    Args:
        lengths (`Sequence[Sequence[int]]`): number of tokens of each sequence, a list per row. All rows have as many
            sequences; a sequence may have no tokens.
        device (`torch.device`): device of the tokens.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], device: torch.device):
        self.lengths = [list(row) for row in lengths]
        self.device = device
        self._histories: dict[int, PackedHistories] = {}

    @classmethod
    def of_ids(cls, sequence_ids: Tensor, num_states: int) -> "PackedSequences":
        """
        The sequences of `sequence_ids`, `num_states` per row, of which the last have no tokens. The host waits for the device.

        Raises:
            ValueError: if a row has more sequences than states.
        """
        run = run_starts(sequence_ids).long().cumsum(dim=-1)
        counts = run.new_zeros(run.shape[0], num_states + 1)
        counts.scatter_add_(1, run.clamp(max=num_states), torch.ones_like(run))
        counts = counts.tolist()
        for row, lengths in enumerate(counts):
            if lengths.pop() > 0:
                raise ValueError(
                    f"Row {row} of sequence_ids has more than {num_states} sequences, but initial_state has {num_states} "
                    "states a row; expected a state for each."
                )
        return cls(counts, sequence_ids.device)

    @property
    def longest(self) -> int:
        return max((length for row in self.lengths for length in row), default=0)

    @cached_property
    def starts(self) -> Tensor:
        """`(batch, sequences + 1)` in int32: the first token of each sequence in its row, and the end of the row."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        starts = torch.nn.functional.pad(lengths.cumsum(dim=1, dtype=torch.int32), (1, 0))
        return starts.to(self.device, non_blocking=True)

    @cached_property
    def batches(self) -> tuple[PackedBatch, ...]:
        """The sequences as the rows of batches."""
        starts, lengths = [], []
        place = 0
        for row in self.lengths:
            for length in row:
                starts.append(place)
                lengths.append(length)
                place += length
        first, batches = torch.tensor(starts), []
        for members in similar_lengths(lengths, free_tokens=free_tokens(self.device)):
            rows = torch.tensor(members)
            counts = torch.tensor([lengths[sequence] for sequence in members])
            within = torch.arange(int(counts[0]))  # the longest is the first
            is_real = within < counts[:, None]
            tokens = first[rows][:, None] + torch.minimum(
                within, counts[:, None] - 1
            )  # padding repeats the last token
            real = is_real.flatten().nonzero().flatten()
            padding = is_real if real.numel() < is_real.numel() else None
            batch = (
                None if x is None else x.to(self.device, non_blocking=True) for x in (rows, tokens, padding, real)
            )
            batches.append(PackedBatch(*batch))
        return tuple(batches)

    def behind_histories(self, number: int) -> PackedHistories:
        """The tokens of the one row, each sequence behind `number` tokens of its history."""
        if number not in self._histories:
            lengths = torch.tensor(self.lengths[0])
            num_sequences, ends = len(lengths), lengths.cumsum(0)
            of_token = torch.arange(num_sequences).repeat_interleave(lengths)
            tokens = torch.arange(len(of_token)) + (of_token + 1) * number
            last = (ends + torch.arange(1, num_sequences + 1) * number)[:, None] - torch.arange(number, 0, -1)
            histories = (ends - lengths + torch.arange(num_sequences) * number)[:, None] + torch.arange(number)
            joined = torch.empty(len(tokens) + num_sequences * number, dtype=torch.long)
            joined[histories.flatten()] = torch.arange(num_sequences * number)
            joined[tokens] = torch.arange(num_sequences * number, len(joined))
            places = (x.to(self.device, non_blocking=True) for x in (joined, tokens, last))
            self._histories[number] = PackedHistories(*places)
        return self._histories[number]

    @cached_property
    def order(self) -> Tensor:
        """Where each token of the call is among the real tokens of all batches, one batch after the other."""
        place = torch.cat([batch.tokens.flatten()[batch.real] for batch in self.batches])
        order = torch.empty_like(place)
        order[place] = torch.arange(len(place), device=self.device)
        return order


def cannot_run_packed(call: AttentionCall, sequences: PackedSequences, backend: str) -> str | None:
    """Why the kernel for packed sequences cannot run a call for which the kernels are chosen, or `None`."""
    from .triton.decoding import is_small_enough

    if needs_gradients(call):
        return "it keeps nothing for a backward pass."
    if call.delta_strength is not None:
        return "the delta rule needs the state of each sequence first."
    if not call.causal or call.strict:
        return "it is causal, and position i reads what positions j <= i wrote."
    if sequences.longest > LONGEST:
        return f"a sequence has more than {LONGEST} tokens."
    if not is_small_enough(call.query, call.value, call.means):
        return "the state of a mixture does not fit a tile (64 components and dimensions)."
    return None


def runs_packed(call: AttentionCall, sequences: PackedSequences, backend: str) -> bool:
    """Whether the kernel for packed sequences takes a call."""
    if WAYS.choose(call, backend=backend).name != "triton":
        return False
    reason = cannot_run_packed(call, sequences, backend)
    if reason is not None:
        explain(
            f"The kernel for packed sequences cannot run this call: {reason} Batches of sequences of similar lengths run it."
        )
    return reason is None


def advance_packed(
    call: AttentionCall, sequences: PackedSequences, states: State, slots: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel for packed sequences: output and normaliser. The states change in place."""
    from .triton import decoding  # noqa: F401 (it defines the operator)

    output, normalizer = torch.ops.gma_hf.fused_packed_attention(
        *call[:6], call.write_weight, call.log_decay, *states, sequences.starts, slots,
        call.eps if call.normalize else None, call.variance_floor, call.output_normalizer, call.correlate,
    )  # fmt: skip
    return output, normalizer if call.output_normalizer else None


def attend_packed(call: AttentionCall, sequence_ids: Tensor | PackedSequences, backend: str) -> AttentionResult:
    """Compute the call by one launch of the kernel, or in batches of sequences of similar lengths."""
    sequences, state = sequence_ids, call.initial_state
    if isinstance(sequence_ids, Tensor):
        sequences = PackedSequences.of_ids(sequence_ids, state[0].shape[1])
    if not runs_packed(call, sequences, backend):
        return attend_in_batches(call, sequences, backend)
    sizes = state[0].shape[:2]
    state = tuple(part.to(call.state_dtype, copy=True).contiguous().flatten(0, 1) for part in state)
    output, normalizer = advance_packed(call, sequences, state, None)
    return AttentionResult(output, tuple(part.unflatten(0, sizes) for part in state), normalizer)


def attend_in_batches(call: AttentionCall, sequences: PackedSequences, backend: str) -> AttentionResult:
    """Compute the call in batches of sequences of similar lengths, each batch by the backend that suits it."""
    (batch, num_states), length = call.initial_state[0].shape[:2], call.query.shape[2]
    if not sequences.batches:  # no tokens: an empty output, and every state as it was
        empty = call._replace(initial_state=None)
        result = AttentionResult(*WAYS.choose(empty, backend=backend).run(empty))
        return result._replace(state=tuple(part.to(call.state_dtype) for part in call.initial_state))
    S, z = (part.flatten(0, 1) for part in call.initial_state)
    results = []
    for members in sequences.batches:
        before = S.index_select(0, members.sequences), z.index_select(0, members.sequences)
        results.append(attend_batch(call, members, before, backend))
    output = torch.cat([result.output for result in results])[sequences.order]
    normalizer = None
    if call.output_normalizer:
        normalizer = torch.cat([result.normalizer for result in results])[sequences.order]
        normalizer = normalizer.unflatten(0, (batch, length)).transpose(1, 2)
    state = None
    if call.output_final_state:
        # States without a sequence do not change
        sequence = torch.cat([members.sequences for members in sequences.batches])
        S, z = (
            before.to(call.state_dtype).index_copy(0, sequence, torch.cat([result.state[i] for result in results]))
            for i, before in enumerate((S, z))
        )
        state = S.unflatten(0, (batch, num_states)), z.unflatten(0, (batch, num_states))
    return AttentionResult(output.unflatten(0, (batch, length)).transpose(1, 2), state, normalizer)


def attend_batch(call: AttentionCall, members: PackedBatch, state: State, backend: str) -> AttentionResult:
    """
    Compute the sequences of one batch.

    Args:
        call (`AttentionCall`): the call of all sequences.
        members (`PackedBatch`): the sequences.
        state (`tuple[torch.Tensor, torch.Tensor]`): S and z before each sequence.
        backend (`str`): `"auto"` or the name of a backend.

    Returns:
        `AttentionResult`: output `(real tokens, heads, value_dim)`, states of the rows, normaliser `(real tokens, heads)`.
    """
    is_real = members.is_real

    def rows_of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.transpose(1, 2).flatten(0, 1)[members.tokens].transpose(1, 2)

    query, key, value, write_weight, log_decay, delta_strength = map(
        rows_of, (call.query, call.key, call.value, call.write_weight, call.log_decay, call.delta_strength)
    )
    if is_real is not None:
        is_padding = ~is_real[:, None]
        if write_weight is None:
            write_weight = is_real[:, None].to(call.state_dtype)
        else:
            write_weight = write_weight.masked_fill(is_padding, 0.0)
        if log_decay is not None:
            log_decay = log_decay.masked_fill(is_padding, 0.0)
    rows = call._replace(
        query=query, key=key, value=value, write_weight=write_weight, log_decay=log_decay, initial_state=state,
        delta_strength=delta_strength, writes_all=call.writes_all and is_real is None,
    )  # fmt: skip
    rows = without_delta_rule(rows)
    result = AttentionResult(*WAYS.choose(rows, backend=backend).run(rows))
    output, normalizer = (
        None if x is None else x.transpose(1, 2).flatten(0, 1)[members.real]
        for x in (result.output, result.normalizer)
    )
    return AttentionResult(output, result.state, normalizer)


PACKED.register(Way("rows", run=attend_packed))
