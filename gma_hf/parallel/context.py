# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Context parallelism: the processes of a group hold one contiguous part each of every sequence.

    with gma_hf.context_parallel(group) as context:
        part = context.split(batch)                # the whole batch on every process, its part of it back
        loss = model(**part).loss                  # this process's share: the shares of all processes add up to the loss
        loss.backward()                            # likewise the gradients
"""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import call_collective


NO_COMPILER = (
    "`torch.compile` and `torch.export` cannot follow context parallelism. Call the model without them, or leave "
    "`context_parallel`."
)


class ContextParallel:
    """
    A group of processes that share every sequence.

    Args:
        group (`ProcessGroup`, *optional*): the processes, in the order of the parts; by default all processes.

    Attributes:
        group (`ProcessGroup`): the processes.
        rank (`int`): the place of this process in the group, and of its part in the sequence.
        size (`int`): number of processes.

    Raises:
        ValueError: if `torch.distributed` was not set up, or this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "Context parallelism needs several processes, and `torch.distributed` was not set up. Start the program with "
                "`torchrun --nproc_per_node=N`, and call `torch.distributed.init_process_group()` first."
            )
        self.group = dist.group.WORLD if group is None else group
        if self.group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "This process is not a member of the group that it was given. Pass the group that this process is in: "
                "`mesh['context'].get_group()` gives it for a device mesh."
            )
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)

    def split(self, batch: dict[str, Any]) -> dict[str, Any]:
        """
        Cut a batch, and return the part that this process computes.

        Args:
            batch (`dict[str, Any]`): the arguments of the model for whole rows, the same on every process.

        Returns:
            `dict[str, Any]`: the arguments for the part of this process, with shifted labels and `num_items_in_batch`, see
            [`gma_hf.parallel.batches.split_batch`].
        """
        from .batches import split_batch

        return split_batch(self, batch)

    def layout_of(
        self,
        tokens: Tensor,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        given: dict[str, Any],
    ) -> Any:
        """
        The layout of the part of a call, with the padding and the packing of the whole rows.

        Args:
            tokens (`torch.Tensor` of shape `(batch, length, ...)`): the tokens of this part.
            padding_mask (`torch.BoolTensor` of shape `(batch, length)` or `None`): `True` at real tokens; `None` if all are
                real.
            position_ids (`torch.Tensor` or `None`): the positions of this part.
            cache (`Cache` or `None`): the cache that the call fills.
            given (`dict[str, Any]`): the other arguments of the model.

        Returns:
            [`Layout`]: the layout, with a `row`.

        Raises:
            ValueError: for arguments that context parallelism does not support, and for parts that do not belong together.
        """
        from .row import gather_row

        seen_tokens = 0 if cache is None else cache.get_seq_length()
        if isinstance(seen_tokens, int) and seen_tokens > 0:
            raise ValueError(
                f"The cache holds {seen_tokens} tokens, but processes that share a sequence read it from its first token. Leave "
                "`context_parallel` to continue from a cache: after `context.prefill`, every process has the whole cache."
            )
        if given.get("output_attentions"):
            raise ValueError(
                "`output_attentions=True` needs all tokens in one process. Call the model outside of `context_parallel`."
            )
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "`cu_seq_lens_q` counts the tokens of whole rows, and this process has a part. Let `context.split(batch)` cut "
                "the whole batch, or pass the part of `seq_idx` or of `position_ids`."
            )
        batch_size, length = tokens.shape[:2]
        seq_idx = given.get("seq_idx")
        row = gather_row(
            self, batch_size, length, tokens.device,
            padding_mask=padding_mask, position_ids=position_ids, seq_idx=seq_idx, anchor=tokens,
        )  # fmt: skip
        return row.layout()

    def total(self, x: Tensor) -> Tensor:
        """
        The sum of a tensor over the processes, for example of losses, without a gradient. All processes have to call this
        method.

        Args:
            x (`torch.Tensor`): a tensor of the same shape on every process.

        Returns:
            `torch.Tensor`: the sum, in the shape of `x`.
        """
        x = x.detach().clone()
        call_collective(dist.all_reduce, x, group=self.group)
        return x

    def sum_gradients(self, model: nn.Module) -> None:
        """
        Add up the gradients of all processes, in place. Call this method in your own training loop. Wrappers for data
        parallelism and [`gma_hf.training.GMATrainer`] add the gradients up themselves.

        Args:
            model (`nn.Module`): the model, the same on every process.
        """
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                call_collective(dist.all_reduce, parameter.grad, group=self.group)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """
        Join the parts of all processes along the tokens, for example logits, without a gradient.

        Args:
            x (`torch.Tensor`): the part of this process.
            dim (`int`, *optional*, defaults to `1`): the dimension of the tokens.

        Returns:
            `torch.Tensor`: the whole, on every process.
        """
        from .collectives import gather_numbers, gather_tokens

        with torch.no_grad():
            lengths = [number for (number,) in gather_numbers(self.group, [x.shape[dim]], x.device)]
            return gather_tokens(self.group, x.detach(), dim, lengths)[0]

    def prefill(self, model: nn.Module, **inputs: Any) -> Any:
        """
        Read a prompt with all processes together, see [`gma_hf.parallel.prefill.prefill`].

        Args:
            model (`nn.Module`): the model, the same on every process.
            inputs (`Any`, *optional*): the arguments of the model for whole rows.

        Returns:
            `Cache`: the whole cache of the prompt, on every process.
        """
        from .prefill import prefill

        return prefill(self, model, **inputs)


# Per thread: other threads and other tasks do not see it
_current: contextvars.ContextVar[ContextParallel | None] = contextvars.ContextVar(
    "gma_hf_context_parallel", default=None
)


_num_entered = 0  # of all threads; compilers can follow a number, but no `ContextVar`
_lock = threading.Lock()


def current_context() -> ContextParallel | None:
    """
    The group in which this thread computes.

    Returns:
        [`ContextParallel`] or `None`: the group; `None` outside of [`context_parallel`].

    Raises:
        ValueError: in compiled code while a group computes.
    """
    if torch.compiler.is_compiling():
        if _num_entered > 0:
            raise ValueError(NO_COMPILER)
        return None
    return _current.get()


@contextmanager
def context_parallel(group: dist.ProcessGroup | ContextParallel | None = None) -> Iterator[ContextParallel]:
    """
    Share every sequence among processes. Within this context, the calls of this thread to GMA models, native and converted,
    take the part of a sequence that this process holds. They compute what one process would compute from the whole sequence.

    Args:
        group (`ProcessGroup` or [`ContextParallel`], *optional*): the processes that share every sequence, in the order of
            the parts; by default all processes.

    Yields:
        [`ContextParallel`]: the group, which splits batches and adds up losses.

    Raises:
        ValueError: if there are no such processes.

    ```python
    >>> import torch.distributed as dist
    >>> import gma_hf

    >>> dist.init_process_group()  # under torchrun
    >>> with gma_hf.context_parallel() as context:
    ...     loss = model(**context.split({"input_ids": tokens, "labels": tokens})).loss
    ...     loss.backward()
    >>> context.sum_gradients(model)
    ```
    """
    context = group if isinstance(group, ContextParallel) else ContextParallel(group)
    token = _current.set(context)
    count_entered(1)
    try:
        yield context
    finally:
        count_entered(-1)
        _current.reset(token)


def count_entered(number: int) -> None:
    global _num_entered
    with _lock:
        _num_entered += number
