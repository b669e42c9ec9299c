# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A `Trainer` that can give mixtures their own learning rate, and that stops before NaN weights replace a good checkpoint.

The stock `transformers.Trainer` trains GMA models too. There, too, the mixtures get no weight decay.
"""

import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..modeling import GMAMixture
from ..parallel.collectives import LOST, ProcessLostError, is_lost
from ..parallel.context import ContextParallel
from . import context
from .callbacks import MixtureHealthCallback
from .checkpoints import STATE_FILE, all_checkpoints, find_last_checkpoint
from .errors import NonFiniteTrainingError, TrainingInputError
from .options import check_options, check_training_numbers


@dataclass
class GMATrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the options of mixtures and of context parallelism.

    Args:
        mixture_learning_rate (`float`, *optional*): learning rate of means, variances and priors of the mixtures, with the
            schedule of `learning_rate`; by default `learning_rate`.
        mixture_health_steps (`int`, *optional*): report the health of the mixtures after every such number of steps, in
            addition to every evaluation.
        context_parallel_size (`int`, *optional*, defaults to `1`): number of processes that share every sequence, each with
            one part of it. Divides the number of processes. See docs/parallel.md.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`): start anew in an output folder with a model or with
            checkpoints, which are deleted.

    Raises:
        ValueError: for impossible values, and if the processes were not connected with each other.
    """

    mixture_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mixtures' parameters; default: learning_rate."}
    )
    mixture_health_steps: int | None = field(
        default=None,
        metadata={
            "help": "Report the health of the mixtures after every such number of steps, not only at evaluations."
        },
    )
    context_parallel_size: int = field(
        default=1,
        metadata={"help": "How many processes share every sequence (for sequences too long for one device)."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew even if output_dir holds a model or checkpoints; these are deleted."},
    )

    def __post_init__(self):
        check_training_numbers(self)
        inherited = {option.name for option in fields(TrainingArguments)}
        own = [option.name for option in fields(self) if option.name not in inherited]
        check_options(self, own, mixture_health_steps=1, context_parallel_size=1)
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise ValueError(
                f"There is nothing to train: `max_steps` is {self.max_steps} and `num_train_epochs` {self.num_train_epochs}. "
                "Give a positive number of steps, or of epochs."
            )
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        if num_processes > 1 and not torch.accelerator.is_available():
            # Accelerate connects processes on the CPU only on request
            self.use_cpu = True
        super().__post_init__()
        if num_processes > 1 and self.world_size == 1:
            raise ValueError(
                f"{num_processes} processes were started, but this one found no others to train with: each would train a "
                "model of its own into one folder. Pass `use_cpu` (--use_cpu) to train with several processes on the CPU, or "
                "start one process."
            )
        if self.context_parallel_size > 1 and self.world_size % self.context_parallel_size != 0:
            raise ValueError(
                f"`context_parallel_size` is {self.context_parallel_size}, which does not divide the {self.world_size} "
                f"processes that were started. Start a multiple of {self.context_parallel_size}, with `torchrun "
                f"--nproc_per_node={self.context_parallel_size}` or `accelerate launch`."
            )


class GMATrainer(Trainer):
    """
    A `Trainer` with a learning rate for mixtures, reports of their health, and checks for NaN.

    Args:
        model (`nn.Module`, *optional*): the model.
        args (`Any`, *optional*): further positional arguments of `transformers.Trainer`. The first should be a
            [`GMATrainingArguments`].
        kwargs (`Any`, *optional*): further keyword arguments of `transformers.Trainer`.
    """

    context: ContextParallel | None = None  # of the processes that share every sequence with this one

    def __init__(self, model: nn.Module | None = None, *args, **kwargs):
        # `Trainer` turns `use_cache` off in the configuration, but a saved model should keep its value
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model, *args, **kwargs)
        size = getattr(self.args, "context_parallel_size", 1)
        if size > 1:
            context.expect_supported(self)
            self.context = context.context_of(self.args.world_size, size, self.args.device.type)
        self.add_callback(MixtureHealthCallback(self, every_steps=getattr(self.args, "mixture_health_steps", None)))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the stock optimizer. With `mixture_learning_rate`, the mixtures get their own group."""
        created = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        learning_rate = getattr(self.args, "mixture_learning_rate", None)
        if created and learning_rate is not None:
            give_own_learning_rate(optimizer, mixture_parameters(model or self.model), learning_rate)
        return optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict as `Trainer` does. With context parallelism, each process returns the rows of its own batch."""
        if self.context is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return context.prediction_step(self, model, inputs, prediction_loss_only)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """
        Train one step as `Trainer` does. A NaN or infinite loss stops the training before the weights change.

        Raises:
            NonFiniteTrainingError: if the loss of this process or of another process is NaN or infinite.
        """
        if self.context is None:
            loss = super().training_step(*args, **kwargs)
        else:
            loss = context.training_step(self, super().training_step, *args, **kwargs)
        finite = torch.isfinite(loss).all()
        if self.args.world_size > 1:
            # Another process may have seen the bad batch, and its gradients are already in ours
            finite = self.accelerator.reduce(finite.float(), "sum") == self.args.world_size
        if not finite:
            value = "NaN or infinite in another process" if torch.isfinite(loss).all() else loss.item()
            raise NonFiniteTrainingError(
                f"The training loss became {value} at step {self.state.global_step + 1}. The weights were not "
                f"updated with it. {self._last_good_checkpoint()} Lower the learning rate, clip the gradients "
                "(--max_grad_norm), use --bf16 instead of --fp16, or look at the data of this step."
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model as `Trainer` does. If a weight is NaN or infinite, the error comes before anything is written.

        Raises:
            NonFiniteTrainingError: if a weight is NaN or infinite.
        """
        bad = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_floating_point() and not torch.isfinite(_local(parameter.detach())).all()
        ]
        any_bad = torch.tensor(float(bool(bad)), device=self.args.device)
        if self.is_fsdp_enabled:  # each process holds a part of the weights
            any_bad = self.accelerator.reduce(any_bad, "sum")
        if any_bad:
            raise NonFiniteTrainingError(
                f"The model has NaN or infinite weights at step {self.state.global_step}"
                + (f" (first in {bad[0]!r})" if bad else "")
                + f", so it is not saved. {self._last_good_checkpoint()} Lower the learning rate or clip the gradients."
            )
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        use_cache_in_training = getattr(config, "use_cache", None)
        target = Path(output_dir or self.args.output_dir)
        # A full disk, or Ctrl-C, must not leave an incomplete model under the final name
        written = target / ".saving"
        if self._use_cache is not None:
            config.use_cache = self._use_cache
        try:
            if hasattr(config, "expect_no_original"):
                config.expect_no_original(target)
            super().save_model(str(written), _internal_call=True)
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # every process takes part
                self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_files(written, target)
        finally:
            if self.args.should_save:
                shutil.rmtree(written, ignore_errors=True)
            if self._use_cache is not None:
                config.use_cache = use_cache_in_training
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def train(self, *args, **kwargs):
        """
        Train as `Trainer` does. A checkpoint that could not be written completely is removed.

        Raises:
            ProcessLostError: if another process has stopped or does not answer. The message names the last good checkpoint.
        """
        before = set(all_checkpoints(self.args.output_dir))
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            if self.args.should_save:
                for folder in set(all_checkpoints(self.args.output_dir)) - before:
                    if not (folder / STATE_FILE).is_file():
                        shutil.rmtree(folder, ignore_errors=True)
            if self.args.world_size > 1 and is_lost(error):
                raise ProcessLostError(f"{self._last_good_checkpoint()} {LOST}{error}") from error
            raise

    def _last_good_checkpoint(self) -> str:
        checkpoint = find_last_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return "No checkpoint had been saved before."
        return f"The last good checkpoint is {checkpoint}; --resume_from_checkpoint {checkpoint} continues from it."


def mixture_parameters(model: nn.Module) -> list[nn.Parameter]:
    """
    The trainable parameters of all mixtures of a model, in native, converted and adapted models.

    Args:
        model (`nn.Module`): any model.

    Returns:
        `list[nn.Parameter]`: the parameters, each once.
    """
    found = (
        parameter
        for module in model.modules()
        if isinstance(module, GMAMixture)
        for parameter in module.parameters()
        if parameter.requires_grad
    )
    return list({id(parameter): parameter for parameter in found}.values())


def give_own_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float
) -> None:
    """Move parameters from their groups into a new group with its own learning rate and without weight decay."""
    if not parameters:
        raise TrainingInputError(
            "`mixture_learning_rate` is set, but the model has no trainable mixture. Leave it out."
        )
    moved = {id(parameter) for parameter in parameters}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not moved <= held:
        raise TrainingInputError(
            f"{type(optimizer).__name__} keeps its parameters outside of parameter groups, so the mixtures cannot have "
            "their own learning rate. Choose another --optim, or leave --mixture_learning_rate out."
        )
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    optimizer.add_param_group({"params": parameters, "lr": learning_rate, "weight_decay": 0.0})


def move_files(source: Path, target: Path) -> None:
    """Move every file of a folder to the same place in another folder, each file in one step."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process has, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
