# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Masks: from the masks of Transformers, over pairs of tokens, to the layout of tokens that GMA needs.

If every layer is converted, [`gaussian_mixture_mask`] makes the masks, and they stay linear in the length. If softmax layers
are left, masks are made for these layers, in the form of their implementation. Converted layers read two things from them:
which tokens are padding, and where a packed sequence begins. Single pairs show both: a real token sees itself, and it sees
the real token before it, unless a sequence begins with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    BlockMask,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
)
from transformers.utils import is_tracing

from ...compat import TransformGetItemToIndex


# Below this, an additive mask means "never": eager masks hold the smallest number of their dtype, some models -10,000
MASKED = -5e3


def gaussian_mixture_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """
    The mask of a model without softmax layers, in the form of `AttentionMaskInterface` of Transformers.

    Args:
        batch_size (`int`), q_length (`int`), kv_length (`int`): number of rows, queries and keys.
        q_offset (`int` or `torch.Tensor`), kv_offset (`int`): positions of the first query and key.
        mask_function (`Callable`): whether a query sees a key.
        attention_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at real tokens.
        use_vmap (`bool`): whether `mask_function` takes one pair at a time.
        device (`torch.device` or `str`): device of the mask.

    Returns:
        `torch.LongTensor` of shape `(batch, kv_length)`: 0 at padding, s >= 1 at a token of the s-th packed sequence. A
        `torch.BoolTensor` if each row is one sequence; `None` if there is no padding either.

    Raises:
        ValueError: if the mask is neither causal nor bidirectional within each sequence.
    """
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding_mask is not None:
        padding_mask = padding_mask[:, kv_offset : kv_offset + kv_length]
        if not is_tracing(padding_mask) and bool(padding_mask.all()):
            padding_mask = None
    sequence_ids = None
    # Transformers separates packed sequences only if all keys are there
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if not plain and q_length == kv_length and q_length > 1 and not isinstance(q_offset, Tensor):

        def is_allowed(query: Tensor, key: Tensor) -> Tensor:
            return _evaluate(mask_function, query + q_offset, key + kv_offset, use_vmap)

        real = padding_mask
        if real is None:
            real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        sequence_ids = _find_sequences(is_allowed, real, check_direction=True)
    if sequence_ids is None:
        return padding_mask
    return sequence_ids + 1 if padding_mask is None else (sequence_ids + 1) * padding_mask


def read_mask(
    attention_mask: Any, query: Tensor, cache_layer: Any = None, is_causal: bool | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """
    Read the padding and the packed sequences of the current tokens from a mask.

    Args:
        attention_mask (`Any`): `None`; a 2D mask, nonzero at real tokens, with other numbers at other packed sequences; a 4D
            mask, boolean or additive; or a `BlockMask` of flex attention.
        query (`torch.Tensor` of shape `(batch, heads, length, dim)`): queries of the current tokens.
        cache_layer (`GMACacheLayer`, *optional*): the state of the layer. A static cache knows the place of the tokens in
            the mask.
        is_causal (`bool`, *optional*): whether the layer is causal; by default the mask decides.

    Returns:
        `tuple`: the padding mask `(batch, length)`, `True` at real tokens, and the numbers of the packed sequences `(batch,
        length)`. Each is `None` if there is no padding, or no packing.

    Raises:
        ValueError: for a mask of pairs with more than padding, causality, packed sequences and a sliding window.
    """
    if attention_mask is None:
        return None, None
    batch_size, length = query.shape[0], query.shape[2]
    columns = first_column(attention_mask, length, getattr(cache_layer, "cumulative_length", None))
    if not isinstance(attention_mask, BlockMask) and attention_mask.ndim == 2:
        current = current_tokens(attention_mask.to(query.device), length, columns)
        if current.dtype == torch.bool:
            return _unless_trivial(current, trivial=True), None
        padding_mask = _unless_trivial(current != 0, trivial=True)
        return padding_mask, _unless_trivial(torch.where(current == 0, 1, current).long() - 1, trivial=0)

    index = torch.arange(length, device=query.device).expand(batch_size, -1)
    if isinstance(attention_mask, BlockMask):

        def is_allowed(queries: Tensor, keys: Tensor) -> Tensor:
            return _evaluate(attention_mask.mask_mod, queries, keys + columns, use_vmap=True)

    else:
        if attention_mask.ndim != 4 or attention_mask.shape[1] != 1:
            raise ValueError(
                f"GMA layers understand attention masks of shape (batch, length) or (batch, 1, length, length), got "
                f"{tuple(attention_mask.shape)}. They cannot follow a mask per head."
            )
        if attention_mask.shape[0] not in (1, batch_size):
            raise ValueError(
                f"The attention mask has {attention_mask.shape[0]} rows, but {batch_size} rows of tokens were given."
            )
        allowed = _boolean(attention_mask.to(query.device))[:, 0].expand(batch_size, -1, -1)
        rows = torch.arange(batch_size, device=query.device)[:, None]

        def is_allowed(queries: Tensor, keys: Tensor) -> Tensor:
            return allowed[rows, queries.clamp(max=allowed.shape[1] - 1), keys + columns]

    real = is_allowed(index, index)
    sequence_ids = _find_sequences(is_allowed, real)
    if not isinstance(attention_mask, BlockMask) and not is_tracing(attention_mask):
        num_plain = getattr(cache_layer, "num_plain", 0)
        is_plain = num_plain > 0 and num_plain == cache_layer.cumulative_length
        _expect_padding_and_packing(attention_mask, allowed, real, sequence_ids, int(columns), is_causal, is_plain)
    return _unless_trivial(real, trivial=True), sequence_ids


def first_column(mask: Any, length: int, seen_tokens: Any) -> int | Tensor:
    """The column of the first current token in a mask."""
    columns = mask.shape[-1] - length
    if columns < 0:
        raise ValueError(
            f"The attention mask covers {mask.shape[-1]} tokens, but {length} tokens were given. It must cover the current "
            "tokens, or the cached and the current tokens."
        )
    # A static cache is longer than the seen tokens; a sliding cache may be shorter
    return seen_tokens.clamp(max=columns) if isinstance(seen_tokens, Tensor) else columns


def current_tokens(mask: Tensor, length: int, columns: int | Tensor) -> Tensor:
    """The part of a 2D mask that belongs to the current tokens."""
    if not isinstance(columns, Tensor):
        return mask.narrow(1, columns, length)
    index = torch.arange(length, device=mask.device) + columns.to(mask.device)
    return mask.gather(1, index.expand(mask.shape[0], -1))


def _find_sequences(
    is_allowed: Callable[[Tensor, Tensor], Tensor], real: Tensor, check_direction: bool = False
) -> Tensor | None:
    """
    Number the packed sequences from 0, for tokens `(batch, length)` whose pairs are allowed or not; `None` if each row is
    one sequence.
    """
    batch_size, length = real.shape
    if length < 2:
        return None
    index = torch.arange(length, device=real.device).expand(batch_size, -1)
    last_real = torch.where(real, index, -1).cummax(dim=1).values
    previous = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    has_previous = real & (previous >= 0)
    previous = previous.clamp(min=0)
    back = is_allowed(index, previous)
    if check_direction and not is_tracing(real):
        forth = is_allowed(previous, index) & has_previous
        if bool(forth.any()) and bool((forth != (back & has_previous)).any()):
            raise ValueError(
                "The model lets some tokens look ahead and others not (blocks of image tokens, a prefix). A GMA layer is "
                "either causal or bidirectional. Keep the layers with such a mask as softmax."
            )
    return _unless_trivial((has_previous & ~back).long().cumsum(dim=1), trivial=0)


def _evaluate(mask_function: Callable, queries: Tensor, keys: Tensor, use_vmap: bool) -> Tensor:
    """`mask_function` at pairs `(batch, length)` of every row."""
    batch = torch.arange(queries.shape[0], device=queries.device)
    head = torch.zeros((), dtype=torch.long, device=queries.device)
    if use_vmap:
        by_token = torch.vmap(mask_function, in_dims=(None, None, 0, 0))
        with TransformGetItemToIndex():
            return torch.vmap(by_token, in_dims=(0, None, 0, 0))(batch, head, queries, keys)
    return mask_function(batch[:, None], head, queries, keys).expand(queries.shape)


def _boolean(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > MASKED


def _unless_trivial(tensor: Tensor, trivial: bool | int) -> Tensor | None:
    """`None` if every entry is trivial. This check reads values, so compiled graphs leave it out."""
    if is_tracing(tensor):
        return tensor
    is_trivial = tensor if trivial is True else tensor == trivial
    return None if bool(is_trivial.all()) else tensor


def _expect_padding_and_packing(
    mask: Tensor,
    allowed: Tensor,
    real: Tensor,
    sequence_ids: Tensor | None,
    columns: int,
    is_causal: bool | None,
    is_plain: bool = False,
) -> None:
    """
    Check that a mask consists of padding, causality, packed sequences and a window only.

    Args:
        mask (`torch.Tensor` of shape `(batch, 1, length, keys)`): the mask.
        allowed (`torch.BoolTensor` of shape `(batch, length, keys)`): the pairs that the mask allows.
        real (`torch.BoolTensor` of shape `(batch, length)`): real tokens.
        sequence_ids (`torch.LongTensor`, *optional*): packed sequences.
        columns (`int`): number of keys before the key of the first query.
        is_causal (`bool`, *optional*): whether the layer is causal.
        is_plain (`bool`): whether all keys before the call are known to be real.

    Raises:
        ValueError: if the mask has anything else.
    """
    length, num_keys = allowed.shape[1:]
    device = allowed.device
    distance = torch.arange(length, device=device)[:, None] + columns - torch.arange(num_keys, device=device)
    seen = allowed & real[:, :, None]
    # A key from before the call exists if a query sees it, or if the cache has read no padding, and belongs to the first sequence
    exists = torch.nn.functional.pad(real, (columns, num_keys - columns - length))
    exists = exists | ((seen.any(dim=1) | is_plain) & (torch.arange(num_keys, device=device) < columns))
    expected = exists[:, None, :].expand(-1, length, -1)
    if sequence_ids is not None:
        of_keys = torch.nn.functional.pad(sequence_ids, (columns, num_keys - columns - length))
        expected = expected & (sequence_ids[:, :, None] == of_keys[:, None, :])
    if is_causal is None:
        is_causal = not bool((seen & (distance < 0)).any())
    if is_causal:
        expected = expected & (distance >= 0)
    expected = expected & (distance.abs() <= torch.where(seen, distance.abs(), 0).max())
    additive = mask.dtype != torch.bool and bool(((mask != 0) & (mask > MASKED)).any())
    if additive or bool(((allowed != expected) & real[:, :, None]).any()):
        raise ValueError(
            "The attention mask says more about pairs of tokens than padding, causality, packed sequences and a sliding "
            f"window. A {'causal' if is_causal else 'bidirectional'} GMA layer cannot follow it. Pass a 2D mask of shape (batch, "
            "length) that marks padding, and `position_ids` that start anew with each packed sequence."
        )
