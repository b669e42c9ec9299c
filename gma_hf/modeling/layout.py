# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Which tokens are padding, which belong to the same packed sequence, and where each stands in its sequence.

Padding may stand anywhere in a row (left, right, in between). Packed sequences are announced in one of three ways:
`seq_idx`, `cu_seq_lens_q`, or `position_ids` that start anew. All end here as `sequence_ids`, what the operator takes.
"""

import torch
from transformers.utils import is_tracing


def select_padding_mask(attention_mask: torch.Tensor | None, query_length: int) -> torch.Tensor | None:
    """
    The part of a 2D attention mask that belongs to the current tokens.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, seen + query_length)`): nonzero at real tokens.
        query_length (`int`): number of current tokens.

    Returns:
        `torch.BoolTensor` of shape `(batch, query_length)`, or `None` where no token is padding.

    Raises:
        ValueError: for a mask that says more than which tokens are padding.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"GMA layers take a 2D attention mask of shape (batch, length) that marks padding, got shape "
            f"{tuple(attention_mask.shape)}. They cannot follow a mask per pair of tokens; for packed sequences pass "
            "`position_ids`, `seq_idx` or `cu_seq_lens_q`."
        )
    if attention_mask.shape[1] < query_length:
        raise ValueError(
            f"The attention mask covers {attention_mask.shape[1]} tokens, but {query_length} tokens were given. It must "
            "cover the current tokens, or the cached and the current tokens."
        )
    padding_mask = attention_mask[:, attention_mask.shape[1] - query_length :] != 0
    # The check reads values, so it is left out of compiled and exported graphs
    if not is_tracing(padding_mask) and bool(padding_mask.all()):
        return None
    return padding_mask


def find_sequence_ids(
    batch_size: int,
    length: int,
    padding_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    Number the packed sequences of each row.

    Args:
        batch_size (`int`), length (`int`): shape of the tokens.
        padding_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at real tokens.
        position_ids (`torch.Tensor` of shape `(batch or 1, length)`, *optional*): a sequence starts where the position of
            a real token does not continue that of the real token before it.
        seq_idx (`torch.Tensor` of shape `(batch or 1, length)`, *optional*): number of the sequence of each token.
        cu_seq_lens (`torch.Tensor` of shape `(num_sequences + 1,)`, *optional*): boundaries of the sequences, of one row.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`, or `None` if each row is one sequence.
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
        seq_idx = torch.searchsorted(cu_seq_lens[1:].contiguous(), index[:1].to(cu_seq_lens.dtype), right=True)

    announced = _expand_rows(seq_idx if seq_idx is not None else position_ids, batch_size, length)
    step = announced - announced.gather(1, previous.clamp(min=0))
    if seq_idx is not None:
        continues = step == 0
    else:
        # Positions may or may not count the padding in between: both go on in the same sequence
        continues = (step >= 1) & (step <= index - previous)
    starts = is_real & (previous >= 0) & ~continues
    if not is_tracing(starts) and not bool(starts.any()):
        return None
    return starts.long().cumsum(dim=1)


def count_positions(
    batch_size: int,
    length: int,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
    seen_tokens: int | torch.Tensor = 0,
) -> torch.Tensor:
    """
    Position of each token within its own sequence, padding not counted.

    Args:
        batch_size (`int`), length (`int`): shape of the current tokens.
        device (`torch.device`): where the positions are wanted.
        attention_mask (`torch.Tensor` of shape `(batch, seen + length)` or `(batch, length)`, *optional*): nonzero at
            real tokens.
        sequence_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): packed sequences.
        seen_tokens (`int` or `torch.Tensor`): number of tokens in the cache.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`, or `(1, length)` where all rows are alike.
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


def same_sequence_mask_function(sequence_ids: torch.Tensor):
    """The mask function, as `transformers.masking_utils` composes them, that keeps packed sequences apart."""
    last = sequence_ids.shape[1] - 1

    def same_sequence(batch_idx, head_idx, q_idx, kv_idx):
        # A static cache is longer than the sequences; what lies behind them is masked by causality
        return sequence_ids[batch_idx, q_idx] == sequence_ids[batch_idx, kv_idx.clamp(max=last)]

    return same_sequence


def _expand_rows(tensor: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:
    if tensor.ndim != 2 or tensor.shape[0] not in (1, batch_size) or tensor.shape[1] != length:
        raise ValueError(
            f"`position_ids` and `seq_idx` must have shape ({batch_size}, {length}) or (1, {length}), "
            f"got {tuple(tensor.shape)}."
        )
    return tensor.long().expand(batch_size, -1)
