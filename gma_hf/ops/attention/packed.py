# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Packed sequences, each with its own state: sequence s of a row starts from S_0[s], z_0[s], and ends with S_s, z_s.

    S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T,   z_t likewise with v_t = 1        S_{start of s - 1} = S_0[s]

Sequences of similar lengths become the rows of a batch with one state per row, which every backend can run. Padding stands
after the shorter sequences. It does not write (w = 0) and does not forget (a = 1), so the states after the padding are the
states after the last tokens. The lengths have to be known on the host, which waits for the device once. `torch.compile`
breaks its graph there.

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], sequence_ids [B, N], S_0 [B, s, M, C, dv], z_0 [B, s, M, C]
-> output [B, Hq, N, dv], S [B, s, M, C, dv], z [B, s, M, C], D [B, Hq, N].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..dispatch import Way
from .call import PACKED, WAYS, AttentionCall, AttentionResult, run_starts


# The largest padding of a row in tokens, and as a share of the longest row; rows with more padding go to another batch
FREE_PADDING, PADDED_SHARE = 16, 0.25


def similar_lengths(lengths: Sequence[int], kind: Callable[[int], tuple] = lambda sequence: ()) -> list[list[int]]:
    """
    Group sequences that run as the rows of one batch.

    Args:
        lengths (`Sequence[int]`): number of tokens of each sequence.
        kind (`Callable`, *optional*): the kind of a sequence by its number. All rows of a batch are of one kind.

    Returns:
        `list[list[int]]`: numbers of sequences, one list per batch, the longest sequences first. Sequences without tokens
        are left out.
    """
    order = [sequence for sequence, length in enumerate(lengths) if length > 0]
    order.sort(key=lambda sequence: (kind(sequence), -lengths[sequence]))
    batches: list[list[int]] = []
    for sequence in order:
        if batches:
            first = batches[-1][0]
            free = max(FREE_PADDING, PADDED_SHARE * lengths[first])
            if kind(sequence) == kind(first) and lengths[first] - lengths[sequence] <= free:
                batches[-1].append(sequence)
                continue
        batches.append([sequence])
    return batches


def lengths_of_sequences(sequence_ids: Tensor, num_states: int) -> list[list[int]]:
    """
    Number of tokens of every sequence, `num_states` numbers per row; 0 after the last sequence of a row.

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
                f"Row {row} of sequence_ids has more than {num_states} sequences, but initial_state has {num_states} states "
                "a row; expected a state for each."
            )
    return counts


def attend_packed(call: AttentionCall, sequence_ids: Tensor, backend: str) -> AttentionResult:
    """Compute the call in batches of sequences of similar lengths, each batch by the backend that suits it."""
    (batch, length), (S, z) = sequence_ids.shape, call.initial_state
    num_states = S.shape[1]
    S, z = S.flatten(0, 1), z.flatten(0, 1)
    starts, lengths = [], []
    for row, counts in enumerate(lengths_of_sequences(sequence_ids, num_states)):
        place = row * length
        for count in counts:
            starts.append(place)
            lengths.append(count)
            place += count

    device, first = call.query.device, torch.tensor(starts)
    places, sequences, results = [], [], []
    for members in similar_lengths(lengths):
        rows = torch.tensor(members)
        counts = torch.tensor([lengths[sequence] for sequence in members])
        within = torch.arange(int(counts[0]))  # the longest is the first
        is_real = within < counts[:, None]
        tokens = first[rows][:, None] + torch.minimum(within, counts[:, None] - 1)  # padding repeats the last token
        real = is_real.flatten().nonzero().flatten()
        places.append(tokens.flatten()[real].to(device))
        sequences.append(rows.to(device))
        is_padded = real.numel() < is_real.numel()
        before = S.index_select(0, sequences[-1]), z.index_select(0, sequences[-1])
        padding = is_real.to(device) if is_padded else None
        results.append(attend_batch(call, tokens.to(device), padding, real.to(device), before, backend))
    if not results:  # no tokens: an empty output, and every state as it was
        empty = call._replace(initial_state=None)
        result = AttentionResult(*WAYS.choose(empty, backend=backend).run(empty))
        return result._replace(state=tuple(part.to(call.state_dtype) for part in call.initial_state))

    place = torch.cat(places)
    order = torch.empty_like(place)
    order[place] = torch.arange(len(place), device=device)
    output = torch.cat([result.output for result in results])[order]
    normalizer = None
    if call.output_normalizer:
        normalizer = torch.cat([result.normalizer for result in results])[order]
        normalizer = normalizer.unflatten(0, (batch, length)).transpose(1, 2)
    state, sequence = None, torch.cat(sequences)
    if call.output_final_state:
        # States without a sequence do not change
        S, z = (
            before.to(call.state_dtype).index_copy(0, sequence, torch.cat([result.state[i] for result in results]))
            for i, before in enumerate((S, z))
        )
        state = S.unflatten(0, (batch, num_states)), z.unflatten(0, (batch, num_states))
    return AttentionResult(output.unflatten(0, (batch, length)).transpose(1, 2), state, normalizer)


def attend_batch(
    call: AttentionCall, tokens: Tensor, is_real: Tensor | None, real: Tensor, state: tuple, backend: str
) -> AttentionResult:
    """
    Compute the sequences of one batch.

    Args:
        call (`AttentionCall`): the call of all sequences.
        tokens (`torch.LongTensor` of shape `(rows, longest)`): places of the tokens among the tokens of all rows of the
            call.
        is_real (`torch.BoolTensor` of shape `(rows, longest)`, *optional*): `False` at padding; `None` without padding.
        real (`torch.LongTensor` of shape `(real tokens,)`): places of the real tokens in the batch.
        state (`tuple[torch.Tensor, torch.Tensor]`): S and z before each sequence.
        backend (`str`): `"auto"` or the name of a backend.

    Returns:
        `AttentionResult`: output `(real tokens, heads, value_dim)`, states of the rows, normaliser `(real tokens, heads)`.
    """

    def rows_of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.transpose(1, 2).flatten(0, 1)[tokens].transpose(1, 2)

    query, key, value, write_weight, log_decay = map(
        rows_of, (call.query, call.key, call.value, call.write_weight, call.log_decay)
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
        writes_all=call.writes_all and is_real is None,
    )  # fmt: skip
    result = AttentionResult(*WAYS.choose(rows, backend=backend).run(rows))
    output, normalizer = (
        None if x is None else x.transpose(1, 2).flatten(0, 1)[real] for x in (result.output, result.normalizer)
    )
    return AttentionResult(output, result.state, normalizer)


PACKED.register(Way("rows", run=attend_packed))
