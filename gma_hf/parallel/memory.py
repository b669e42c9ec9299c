# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The state before a part. A layer that continues from a [`MemoryState`] computes the same as over all tokens at once, so a
part needs only the state before it:

    S, z                the states of the parts, added up (`state.py`)
    window              the last W real tokens before the part, from the previous process, or from several if parts are short
    sink tokens         the first s tokens of the sequence, from the process that has them
    convolution         the last kernel_size - 1 inputs before the part

Only tokens of the first sequence of the part count.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..modeling.memory_state import MemoryState, Tokens
from ..ops.window.plan import token_dim
from .collectives import call_collective, gather, shifted_from
from .selection import take
from .state import add_before, add_others, decayed_weights, exchange_states


if TYPE_CHECKING:
    from .row import Row


def last_before(
    row: "Row",
    tensors: list[Tensor],
    dims: list[int],
    number: int,
    link: Tensor | None = None,
    same_sequence: bool = True,
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """
    The last real tokens before the part.

    Args:
        row ([`Row`]): the layout of the whole rows.
        tensors (`list[torch.Tensor]`): the tensors of this part, with tokens along `dims`.
        number (`int`): number of tokens.
        link (`torch.Tensor`, *optional*): the link of the messages before this one.
        same_sequence (`bool`): whether only tokens of the sequence that continues count.

    Returns:
        `tuple`: the tensors with `number` tokens each, right-aligned; which tokens exist, `(batch, number)` or `None` if all
        do; and the link of the message.
    """
    halo = row.halo(number, same_sequence)
    own = [row.take_last(x, dim, number) for x, dim in zip(tensors, dims, strict=True)]
    arrived = []
    for distance in range(halo.hops, 0, -1):
        got, link = shifted_from(row.context.group, distance * row.direction, own, link)
        arrived.append(got)
    device = tensors[0].device
    valid = None if halo.valid is None else halo.valid.to(device)
    joined = []
    for parts, dim in zip(zip(*arrived, strict=True), dims, strict=True):
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
        joined.append(x if halo.order is None else take(x, dim, halo.order))
    return joined, valid, link


def convolution_before(row: "Row", inputs: Tensor, number: int) -> Tensor:
    """The last inputs `(batch, number, channels)` of the short convolution; zeros if the sequence has fewer."""
    (past,), valid, _ = last_before(row, [inputs], [1], number)
    return past if valid is None else past.masked_fill(~valid[..., None], 0)


def window_before(row: "Row", tokens: Tokens, size: int, num_sinks: int) -> tuple[MemoryState | None, Tensor]:
    """
    The state of a window and its memory before the part, without S and z; empty on the first process.

    Args:
        row ([`Row`]): the layout of the whole rows.
        tokens ([`Tokens`]): the tokens of this part.
        size (`int`), num_sinks (`int`): W and s.

    Returns:
        `tuple`: the history, with `None` for S and z, and the link of the messages.
    """
    given = [x for x in tokens if x is not None]
    (*kept,), valid, link = last_before(row, given, [token_dim(x) for x in given], size)
    sinks, link = sinks_before(row, tokens, size, num_sinks, link)
    if row.rank == 0:
        return None, link
    kept = iter(kept)
    keys, values, routing_keys, write_weight, log_decay = (None if x is None else next(kept) for x in tokens)
    batch_size, device = keys.shape[0], keys.device
    count = row.count_before()
    if isinstance(count, int):
        all_exist = count >= size + num_sinks
        count = count - size - num_sinks
    else:
        all_exist = False
        count = (count - size - num_sinks).clamp(min=0)
    if all_exist:
        valid, sinks = None, (*sinks[:2], None)
    elif valid is None:
        valid = torch.ones(batch_size, size, dtype=torch.bool, device=device)
    if valid is not None:
        keys, values = (x.masked_fill(~valid[:, None, :, None], 0) for x in (keys, values))
    return MemoryState(None, None, keys, values, valid, routing_keys, write_weight, log_decay, *sinks, count), link


def sinks_before(
    row: "Row", tokens: Tokens, size: int, num_sinks: int, link: Tensor
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """
    Keys, values and existence of the sink tokens that have left the window before the part, right-aligned; and the link.
    """
    if num_sinks == 0:
        return (None, None, None), link
    places, exists = row.sink_places(row.rank, num_sinks)
    keys, values = (take(x, 2, places - row.start, exists) for x in tokens[:2])
    dtype = torch.promote_types(keys.dtype, values.dtype)
    gathered, link = gather(row.context.group, torch.cat([keys.to(dtype), values.to(dtype)], dim=-1), link)
    if row.rank == 0:
        return (None, None, None), link
    flags = []
    for rank in range(row.rank):
        places, exists = row.sink_places(rank, num_sinks)
        if row.sequence_ids is not None:
            exists = exists & (row.sequence_ids.gather(1, places) == row.first_id(row.rank))
        flags.append(exists)
    found = torch.cat(flags, dim=1).to(keys.device)  # [B, rank * s], of which the first s that exist are the sinks
    nth = found.long().cumsum(dim=1)
    count = row.count_before()
    if isinstance(count, int):
        count = torch.full((keys.shape[0],), count, device=keys.device)
    num_left = (count.to(keys.device) - size).clamp(min=0, max=num_sinks)[:, None]
    wanted = torch.arange(1, num_sinks + 1, device=keys.device) - (num_sinks - num_left)
    valid = wanted >= 1
    places = torch.searchsorted(nth, wanted.clamp(min=1)).clamp(max=nth.shape[1] - 1)
    joined = take(torch.cat(list(gathered[: row.rank]), dim=2), 2, places, valid)
    key_dim = keys.shape[-1]
    return (joined[..., :key_dim].to(keys.dtype), joined[..., key_dim:].to(values.dtype), valid), link


def state_before(
    row: "Row",
    mixture: nn.Module,
    keys: Tensor,
    values: Tensor,
    write_weight: Tensor | None,
    log_decay: Tensor | None,
    runs: Tensor | None,
    *,
    causal: bool,
    is_last: Tensor | None = None,
    link: Tensor | None = None,
    output_link: bool = False,
) -> Any:
    """
    The memory before this part; for bidirectional calls, the writes of all other parts.

    Args:
        row ([`Row`]): the layout of the whole rows.
        mixture (`GMAMixture`): the mixture of the layer.
        keys, values, write_weight, log_decay (`torch.Tensor`): the writes of this part, as arguments of the mixture.
        runs (`torch.LongTensor` of shape `(batch, length)`, *optional*): packed sequences of these tokens.
        causal (`bool`): whether a token sees the tokens before it only.
        is_last (`torch.BoolTensor` of shape `(batch,)`, *optional*): whether the last of these tokens belongs to the last
            sequence.
        link (`torch.Tensor`, *optional*): the link of the messages before this one.

    Returns:
        `tuple`: S `(batch, mixtures, components, value_dim)` and z `(batch, mixtures, components)`; with `output_link` the
        pair of them and the link of the message.
    """
    mixtures = mixture.means.shape[0]
    total = None
    if causal:
        write_weight, total = decayed_weights(write_weight, log_decay, runs, mixtures)
    S, z = mixture.write(keys, values, write_weight)
    if causal and runs is not None:
        # Writes for a sequence that has ended are not passed on, and neither is a memory to a sequence that begins here
        ends = torch.zeros(row.batch_size, dtype=torch.bool, device=S.device)
        if row.continues is not None:
            ends = ends | ~row.continues.to(S.device)
        if is_last is not None:
            ends = ends | ~is_last
            S, z = S * is_last[:, None, None, None], z * is_last[:, None, None]
        total = total.masked_fill(ends[:, None], float("-inf"))
    S, z, total, link = exchange_states(row.context.group, S, z, total, link)
    if row.direction < 0:
        S, z, total = (None if x is None else x.flip(0) for x in (S, z, total))
    if not causal:
        return add_others(S, z, row.rank)
    S, z = add_before(S, z, total, row.rank)
    if row.continues is not None:
        goes_on = row.continues.to(S.device)
        S, z = S * goes_on[:, None, None, None], z * goes_on[:, None, None]
    return ((S, z), link) if output_link else (S, z)


def last_history(row: "Row", history: MemoryState) -> MemoryState:
    """The state of the last process after its part, on every process. Gradients do not flow through it."""
    device = history.state.device
    last = row.context.size - 1
    box = [history.map(lambda x: x.detach().cpu()) if row.rank == last else None]
    source = dist.get_global_rank(row.context.group, last)
    call_collective(dist.broadcast_object_list, box, src=source, group=row.context.group)
    return MemoryState(*box[0]).map(lambda x: x.to(device))
