# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What travels between the processes of a group, with gradients that travel back. R processes, process r has x_r:

    gather       y_r = (x_0, ..., x_{R-1})         dx_j = sum over r of (dy_r)_j
    shift by k   y_r = x_{r-k}, or zeros           dx_r = dy_{r+k}, or zeros
    sum          y_r = x_0 + ... + x_{R-1}         not differentiated

Every process has to call the same collectives in the same order, backwards too. Autograd decides the order of the backward pass
by what depends on what. So each function here takes and returns a `link`, a number that is always zero: a function that was given
the link of another one comes after it forwards, and before it backwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessLostError(RuntimeError):
    """Another process of the group has stopped, or does not answer. Start all processes again."""


LOST = (
    "Another process has stopped or does not answer, so this process cannot continue. Look for the first error among the outputs "
    "of all processes. Start all processes again; a training continues from its last checkpoint with --resume_from_checkpoint. This "
    "process reports: "
)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer. Gloo has no class for such errors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def call_collective(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """
    Call a function of `torch.distributed`.

    Raises:
        ProcessLostError: if another process has stopped.
    """
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ProcessLostError(f"{LOST}{error}") from error


class Gather(torch.autograd.Function):
    """`(R, ...)` on every process, from tensors of one shape."""

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, x: Tensor, link: Tensor) -> tuple[Tensor, Tensor]:
        ctx.group = group
        x = x.contiguous()
        gathered = x.new_empty(dist.get_world_size(group), *x.shape)
        call_collective(dist.all_gather_into_tensor, gathered.view(-1), x.view(-1), group=group)
        return gathered, link.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor, link: Tensor) -> tuple[None, Tensor, Tensor]:
        # Sums of 16-bit numbers are taken in float32
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        parts = gradient.to(dtype).contiguous()
        summed = torch.empty_like(parts[0])
        call_collective(dist.reduce_scatter_tensor, summed.view(-1), parts.view(-1), group=ctx.group)
        return None, summed.to(gradient.dtype), link


class Shift(torch.autograd.Function):
    """
    The tensors of the process `distance` places before this process (after it, if negative); zeros if there is no such
    process.
    """

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, distance: int, link: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.distance = group, distance
        return link.clone(), *shift(group, distance, tensors)

    @staticmethod
    def backward(ctx, link: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, link, *shift(ctx.group, -ctx.distance, gradients)


def shift(group: dist.ProcessGroup, distance: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values of [`Shift`], in one message a dtype."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    source, target = rank - distance, rank + distance
    received: list[Tensor | None] = [None] * len(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        chosen = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        message = torch.cat([tensors[i].reshape(-1) for i in chosen])
        sent, got = [0] * size, [0] * size
        if 0 <= target < size:
            sent[target] = message.numel()
        if 0 <= source < size:
            got[source] = message.numel()
        answer = message.new_empty(sum(got))
        call_collective(dist.all_to_all_single, answer, message[: sum(sent)], got, sent, group=group)
        if not 0 <= source < size:
            answer = torch.zeros_like(message)
        for i, part in zip(chosen, answer.split([tensors[i].numel() for i in chosen]), strict=True):
            received[i] = part.view(tensors[i].shape)
    return received


def gather(group: dist.ProcessGroup, x: Tensor, link: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Args:
        group (`ProcessGroup`): the processes.
        x (`torch.Tensor`): of the same shape and dtype on every process.
        link (`torch.Tensor`, *optional*): of the collective before this one.

    Returns:
        `(R, ...)`, and the new link.
    """
    return Gather.apply(group, x, new_link(x) if link is None else link)


def shifted_from(
    group: dist.ProcessGroup, distance: int, tensors: Sequence[Tensor], link: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """
    Args:
        group (`ProcessGroup`): the processes.
        distance (`int`): how many places the sender stands before the receiver; negative for senders behind it.
        tensors (`Sequence[torch.Tensor]`): of the same shapes and dtypes on every process.
        link (`torch.Tensor`, *optional*): of the collective before this one.

    Returns:
        What arrived, and the new link.
    """
    link, *received = Shift.apply(group, distance, new_link(tensors[0]) if link is None else link, *tensors)
    return received, link


def new_link(x: Tensor) -> Tensor:
    """A zero that depends on nothing. It requires a gradient where gradients are recorded, so that no process leaves one out."""
    return torch.zeros((), device=x.device, requires_grad=torch.is_grad_enabled())


def gather_numbers(group: dist.ProcessGroup, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """A few numbers of every process, `R` lists."""
    own = torch.tensor(numbers, dtype=torch.long, device=device)
    gathered = own.new_empty(dist.get_world_size(group), len(numbers))
    call_collective(dist.all_gather_into_tensor, gathered.view(-1), own, group=group)
    return gathered.tolist()


def gather_tokens(
    group: dist.ProcessGroup, x: Tensor, dim: int, lengths: Sequence[int], link: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The parts of all processes, which have `lengths` tokens along `dim`, side by side; and the new link."""
    longest = max(lengths)
    missing = longest - x.shape[dim]
    if missing > 0:
        shape = [missing if i == dim else n for i, n in enumerate(x.shape)]
        x = torch.cat([x, x.new_zeros(shape)], dim=dim)
    parts, link = gather(group, x, link)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim=dim), link
