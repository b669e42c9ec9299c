# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Context parallelism inside of a `Trainer`: the processes form a mesh of data x context.

Every process gets its own batches from its data loader, as in data parallelism. The c processes of a group compute the c
batches one after the other. Each process computes its part of every sequence. So a step has the rows, the loss and the
gradients of data parallelism with the same arguments, and a process holds 1/c of the tokens of one batch at a time.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..parallel.batches import IGNORED_LABEL, split_batch
from ..parallel.collectives import call_collective
from ..parallel.context import ContextParallel, context_parallel


if TYPE_CHECKING:
    from .trainer import GMATrainer


def context_of(world_size: int, size: int, device_type: str) -> ContextParallel:
    """
    The group of this process in a mesh of data x context.

    Args:
        world_size (`int`): number of all processes.
        size (`int`): number of processes that share a sequence. They are neighbours, because neighbours have the fastest
            connection.
        device_type (`str`): type of the devices.

    Returns:
        [`ContextParallel`]: the group.

    Raises:
        ValueError: if the processes cannot be grouped in this way.
    """
    if world_size % size != 0:
        raise ValueError(
            f"{world_size} processes cannot be cut into groups of `context_parallel_size` = {size}. Start a multiple of {size} "
            "processes, or choose a size that divides their number."
        )
    mesh = init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=("data", "context"))
    return ContextParallel(mesh["context"].get_group())


def expect_supported(trainer: "GMATrainer") -> None:
    """
    Check that all arguments work with context parallelism.

    Raises:
        ValueError: if one does not.
    """
    args = trainer.args
    parallelism = getattr(args, "parallelism_config", None)
    reasons = {
        "`torch_compile`": args.torch_compile,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "several GPUs in one process (start one process a GPU with `torchrun`)": args.n_gpu > 1,
        "`label_smoothing_factor`": args.label_smoothing_factor != 0,
        "`compute_loss_func`": trainer.compute_loss_func is not None,
        "`average_tokens_across_devices=False`": not args.average_tokens_across_devices,
        "a model that ignores `num_items_in_batch`": not trainer.model_accepts_loss_kwargs,
        "sizes in `parallelism_config` besides": parallelism is not None and parallelism.non_data_parallel_size > 1,
    }
    found = [reason for reason, is_given in reasons.items() if is_given]
    if found:
        raise ValueError(
            f"`context_parallel_size` does not go together with {', '.join(found)}. Leave one of them out."
        )


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model predicts the next token, and so shifts its labels."""
    return getattr(model, "loss_type", None) == "ForCausalLM"


def share_batches(context: ContextParallel, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The batches of all processes of a group, one after the other, on each process."""
    for rank in range(context.size):
        box = (
            [{name: x.cpu() if isinstance(x, Tensor) else x for name, x in batch.items()}]
            if rank == context.rank
            else [None]
        )
        source = dist.get_global_rank(context.group, rank)
        call_collective(dist.broadcast_object_list, box, src=source, group=context.group)
        yield box[0]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def training_step(
    trainer: "GMATrainer", step: Any, model: nn.Module, inputs: dict[str, Any], *args, **kwargs
) -> Tensor:
    """
    One step over each batch of a group. The gradients are exchanged once.

    Args:
        trainer ([`GMATrainer`]): the trainer.
        step (`Callable`): `Trainer.training_step`.
        model, inputs, args, kwargs: its arguments.

    Returns:
        `torch.Tensor`: the share of the loss of this process.
    """
    context, total = trainer.context, None
    shifts = shifts_labels(trainer.accelerator.unwrap_model(model))
    for rank, batch in enumerate(share_batches(context, inputs)):
        is_last = rank == context.size - 1
        with context_parallel(context), nullcontext() if is_last else trainer.accelerator.no_sync(model):
            part = split_batch(context, to_device(batch, trainer.args.device), shifts)
            # `Trainer` has counted the labels of all processes and all batches of the step
            part.pop("num_items_in_batch", None)
            loss = step(model, part, *args, **kwargs)
        total = loss if total is None else total + loss
    return total


@torch.no_grad()
def prediction_step(
    trainer: "GMATrainer", model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The loss of the batch of this process, its logits and labels, as `Trainer.prediction_step` returns them."""
    context, kept = trainer.context, None
    shifts = shifts_labels(trainer.accelerator.unwrap_model(model))
    model.eval()
    for rank, batch in enumerate(share_batches(context, inputs)):
        batch = to_device(batch, trainer.args.device)
        with context_parallel(context), trainer.compute_loss_context_manager():
            outputs = model(**split_batch(context, batch, shifts))
        loss = None if batch.get("labels") is None else context.total(outputs["loss"].float())
        logits = None if prediction_loss_only else context.gather(outputs["logits"])
        if rank == context.rank:
            kept = loss, logits, batch.get("labels")
    loss, logits, labels = kept
    if loss is not None:
        # Every label has the same weight, whichever process has its batch
        counted = labels[:, 1:] if shifts else labels
        number = counted.ne(IGNORED_LABEL).sum()
        loss = loss * number / trainer.accelerator.reduce(number.float(), "mean")
    return loss, logits, None if prediction_loss_only else labels
