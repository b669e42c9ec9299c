# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Split a batch. Every process has the whole batch, and takes its columns of all tensors with one column per token.

A causal model predicts token t + 1 at token t, so the label of the last token of a part is in the next part. So labels are
shifted before they are cut. The loss of a batch with N labels is the mean over all labels. Each process computes

    loss_r = (sum over the labels of its part) / N

so the losses of the processes, and their gradients, add up to the loss and the gradients of one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .collectives import call_collective
from .context import ContextParallel


IGNORED_LABEL = -100
# Arguments with one column per token
BY_TOKEN = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "seq_idx", "labels", "shift_labels",
)  # fmt: skip
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def split_batch(context: ContextParallel, batch: dict[str, Any], shift_labels: bool = True) -> dict[str, Any]:
    """
    The part of a batch that a process computes.

    Args:
        context ([`ContextParallel`]): the processes.
        batch (`dict`): the arguments of a model, the same on every process. Tensors of shape `(batch, length, ...)` are cut,
            other values stay.
        shift_labels (`bool`, *optional*, defaults to `True`): whether `labels` are the labels of a causal language model,
            which the model would shift by one token. `False` for masked language models and token classifiers.

    Returns:
        `dict`: the part, for `model(**part)`. With `labels` there are also `shift_labels`, if they are shifted, and
        `num_items_in_batch`, the number of labels of the whole batch.

    Raises:
        ValueError: if the batch cannot be cut, or differs among the processes.
    """
    tokens = batch.get("input_ids") if batch.get("inputs_embeds") is None else batch["inputs_embeds"]
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError(
            "`split` needs `input_ids` of shape (batch, length), or `inputs_embeds`, to know where to cut the batch. It was given "
            f"{sorted(batch)}."
        )
    length = tokens.shape[1]
    expect_same(context, batch, tokens.device)
    first, last = part_of(length, context.rank, context.size)
    batch = {name: value for name, value in batch.items() if value is not None}
    if "cu_seq_lens_q" in batch and "seq_idx" not in batch:
        ends = batch["cu_seq_lens_q"][1:].contiguous().to(tokens.device)
        batch["seq_idx"] = torch.searchsorted(
            ends, torch.arange(length, device=tokens.device, dtype=ends.dtype), right=True
        )[None]
    labels = batch.get("labels")
    if labels is not None:
        if labels.ndim != 2 or labels.shape[1] != length:
            raise ValueError(
                f"`labels` have shape {tuple(labels.shape)}, but a sequence of {length} tokens that is cut over processes needs a "
                "label for every token. Sequence classification and question answering are not supported under context "
                "parallelism: use data parallelism."
            )
        if shift_labels and "shift_labels" not in batch:
            batch["shift_labels"] = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
        counted = batch.get("shift_labels", labels)
        batch.setdefault("num_items_in_batch", counted.ne(IGNORED_LABEL).sum())
    part = {}
    for name, value in batch.items():
        if name in BOUNDARIES:
            continue
        if name in BY_TOKEN and isinstance(value, Tensor):
            if value.ndim < 2 or value.shape[1] != length:
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}, but the sequences have {length} tokens: it cannot be cut with "
                    "them. Context parallelism takes 2D masks of shape (batch, length)."
                )
            value = value[:, first:last].contiguous()
        elif isinstance(value, Tensor) and value.ndim >= 2:
            raise ValueError(
                f"Context parallelism does not know how to cut `{name}` of shape {tuple(value.shape)}. Leave it out, or use data "
                f"parallelism. It cuts {', '.join(BY_TOKEN)}."
            )
        part[name] = value
    return part


def part_of(length: int, rank: int, size: int) -> tuple[int, int]:
    """
    The first place of a part and the place after its last place. The lengths of parts differ by one token at most.

    Raises:
        ValueError: if there are fewer tokens than processes.
    """
    if length < size:
        raise ValueError(
            f"A sequence of {length} tokens cannot be cut into {size} parts: every process needs at least one token. Use longer "
            "sequences, or fewer processes for a sequence (`context_parallel_size`)."
        )
    short, rest = divmod(length, size)
    first = rank * short + min(rank, rest)
    return first, first + short + (rank < rest)


def expect_same(context: ContextParallel, batch: dict[str, Any], device: torch.device) -> None:
    """
    Compare a number that depends on all values of a batch among the processes.

    Raises:
        ValueError: if they differ.
    """
    own = torch.tensor(fingerprint(batch), dtype=torch.long, device=device)
    most = torch.stack([own, -own])
    call_collective(dist.all_reduce, most, op=dist.ReduceOp.MAX, group=context.group)
    if bool((most[0] != -most[1]).any()):  # the largest and the smallest
        raise ValueError(
            "The processes of a context-parallel group were given different batches, but each computes a part of the same one. "
            "Give them the same data in the same order: one sampler for a group, not one for a process; the same seed; no random "
            "masking after the batches were distributed."
        )


def fingerprint(batch: dict[str, Any]) -> list[int]:
    """Two numbers that depend on the names, shapes and values of the tensors of a batch."""
    names, values = 0, 0
    for name, x in sorted(batch.items()):
        if not isinstance(x, Tensor):
            continue
        for character in f"{name}{tuple(x.shape)}{x.dtype}":
            names = (names * 1_000_003 + ord(character)) % (1 << 61)
        x = x.detach().reshape(-1)
        x = x.double().mul(1 << 20).long() if x.is_floating_point() else x.long()
        place = torch.arange(1, x.numel() + 1, device=x.device)
        # Sums of 64-bit integers that wrap around
        values = (values * 1_000_003 + int(((x + 12_345) * (place * 2_654_435_761 + 97)).sum())) % (1 << 61)
    return [names, values]
