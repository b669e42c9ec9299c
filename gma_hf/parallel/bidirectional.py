# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Bidirectional calls: a part needs the tokens before it and the tokens after it. The tokens after it are the tokens before it
in the mirrored row.

    memory         one sequence per row: S and z of all other parts, added up
                   packed: what j <= i wrote, forwards, plus what j > i wrote, backwards; each with the state of the parts there
    window         W real tokens from each side
    convolution    half of its width from each side
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling.layout import Layout
from ..ops.attention.functional import without_autocast
from ..ops.window.functional import EMPTY, accumulation_dtype
from .memory import last_before, state_before


if TYPE_CHECKING:
    from ..modeling.memory_state import Tokens
    from .row import Row


def around(row: "Row", tensors: list[Tensor], dims: list[int], before: int, after: int) -> tuple[list[Tensor], Layout]:
    """
    Tensors with the nearest real tokens of other parts before and after their own tokens.

    Args:
        row ([`Row`]): the layout of the whole rows.
        tensors (`list[torch.Tensor]`): tensors with tokens along `dims`.
        before, after (`int`): number of tokens on each side.

    Returns:
        `tuple`: the tensors with `before + length + after` tokens, and the layout of these tokens.
    """
    sides, masks, ids, link = [], [], [], None
    for side, number in ((row, before), (row.mirrored, after)):
        given = tensors if side is row else [x.flip(dim) for x, dim in zip(tensors, dims, strict=True)]
        if number == 0:
            sides.append([x.narrow(dim, 0, 0) for x, dim in zip(tensors, dims, strict=True)])
            masks.append(None)
            ids.append(None if row.sequence_ids is None else row.sequence_ids[:, :0])
            continue
        got, valid, link = last_before(side, given, dims, number, link, same_sequence=False)
        taken = None if row.sequence_ids is None else side.halo(number, False).ids
        if side is not row:
            got = [x.flip(dim) for x, dim in zip(got, dims, strict=True)]
            valid, taken = (None if x is None else x.flip(1) for x in (valid, taken))
        sides.append(got)
        masks.append(valid)
        ids.append(taken)
    wide = [torch.cat([x, own, y], dim) for x, own, y, dim in zip(sides[0], tensors, sides[1], dims, strict=True)]
    length = row.end - row.start
    own = row.part(row.padding_mask)
    mask = None
    if own is not None or any(x is not None for x in masks):
        device = tensors[0].device
        parts = [masks[0], own, masks[1]]
        for i, number in enumerate((before, length, after)):
            if parts[i] is None:
                parts[i] = torch.ones(row.batch_size, number, dtype=torch.bool, device=device)
        mask = torch.cat([x.to(device) for x in parts], dim=1)
        mask = None if bool(mask.all()) else mask
    sequence_ids = None
    if row.sequence_ids is not None:
        sequence_ids = torch.cat([ids[0], row.part(row.sequence_ids), ids[1]], dim=1)
    return wide, Layout(row.batch_size, before + length + after, mask, sequence_ids)


def read_both_sides(
    row: "Row",
    mixture: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    write_weight: Tensor | None,
    *,
    normalize: bool = True,
    eps: float | None = None,
    output_normalizer: bool = False,
) -> Any:
    """
    The reads of a mixture over whole rows for the queries of this part; with `output_normalizer` also their normalisers.
    """
    ids = row.part(row.sequence_ids)
    arguments = {"normalize": normalize, "eps": eps}
    if ids is None:
        state = state_before(row, mixture, keys, values, write_weight, None, None, causal=False)
        return mixture(
            query, keys, values, causal=False, write_weight=write_weight, initial_state=state,
            output_normalizer=output_normalizer, **arguments,
        )  # fmt: skip
    dtype = values.dtype
    values = values.to(accumulation_dtype(query, values))
    if normalize:
        values = F.pad(values, (0, 1), value=1.0)
    if write_weight is None:
        write_weight = torch.ones(query.shape[0], 1, query.shape[2], dtype=torch.float32, device=query.device)
    before, link = state_before(
        row, mixture, keys, values, write_weight, None, ids, causal=True, output_link=True
    )  # fmt: skip
    forwards = mixture(
        query,
        keys,
        values,
        causal=True,
        write_weight=write_weight,
        sequence_ids=ids,
        normalize=False,
        initial_state=before,
    )
    # Backwards, a token reads the tokens before it only, so every key is written one place later, unless a new sequence
    # begins there
    query, keys, values, write_weight = (x.flip(2) for x in (query, keys, values, write_weight))
    ids = ids.flip(1)
    behind = state_before(row.mirrored, mixture, keys, values, write_weight, None, ids, causal=True, link=link)
    late_keys, late_values, late_weight = (
        torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], dim=2) for x in (keys, values, write_weight)
    )
    late_weight = late_weight * F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))[:, None]
    backwards = mixture(
        query, late_keys, late_values, causal=True, write_weight=late_weight, sequence_ids=ids, normalize=False,
        initial_state=behind,
    )  # fmt: skip
    output, normalizer = forwards + backwards.flip(2), None
    if normalize:
        normalizer = output[..., -1] + (mixture.eps if eps is None else eps)
        output = output[..., :-1] / normalizer[..., None]
    output = output.to(dtype)
    return (output, normalizer) if output_normalizer else output


def read_around_window(
    row: "Row",
    mixture: nn.Module,
    window: nn.Module,
    query: Tensor,
    routing_query: Tensor,
    tokens: "Tokens",
    *,
    weigh_by_routing: bool,
    **arguments: Any,
) -> Tensor:
    """The output of a bidirectional window and its memory, for the queries of this part."""
    size, (batch_size, _, length, _) = window.window_size, query.shape
    dtype = accumulation_dtype(query, tokens.values)
    mask = row.part(row.padding_mask)
    write_weight = tokens.write_weight
    if mask is not None:
        is_real = mask[:, None].to(torch.float32)
        write_weight = is_real if write_weight is None else write_weight * is_real
    with without_autocast(query.device.type):
        read, normalizer = read_both_sides(
            row,
            mixture,
            routing_query,
            tokens.keys if tokens.routing_keys is None else tokens.routing_keys,
            tokens.values,
            write_weight,
            eps=EMPTY,
            output_normalizer=True,
        )
        (keys, values), layout = around(row, [tokens.keys, tokens.values], [2, 2], size, size)
        growth = (row.counts(query.device).to(dtype) / size).log1p()[:, None]

        def widen(x: Tensor, dim: int = 2) -> Tensor:
            """Add places for the tokens around the part. Their outputs are dropped."""
            x = F.pad(x, (*[0, 0] * (x.ndim - 1 - dim), size, size))
            return layout.sort(x.expand(batch_size, *x.shape[1:]), dim)

        plan = layout.window(size, 0, False, dtype, query.device, False)
        output = window(
            widen(query),
            layout.sort(keys, 2),
            layout.sort(values, 2),
            plan.valid,
            plan.runs,
            widen(read),
            widen(normalizer.log()),
            widen(growth),
            weighing_query=widen(routing_query) if weigh_by_routing else None,
            size=plan.size,
            causal=False,
            **arguments,
        )
    output = layout.unsort(output, 2)[:, :, size : size + length]
    return output if mask is None else output.masked_fill(~mask[:, None, :, None], 0)
