# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Trainings that end on time: the learning rate follows the clock."""

import math
import tempfile
import time

import torch
from transformers import TrainerCallback

from gma_hf.conversion.distillation.arguments import GMADistillationArguments
from gma_hf.conversion.distillation.trainer import GMADistillationTrainer, undo_preparation


class TimedSchedule(TrainerCallback):
    """
    A warm-up and half a cosine over a given time, and then the end.

    Args:
        seconds: of the training.
        floor: share of the learning rate that is left at the end.
        warmup_steps: over which the rate grows.
        warmup_share: of the time, which bounds the warm-up and the rate within it; by default the steps alone do.
    """

    def __init__(self, seconds: float, floor: float, warmup_steps: int, warmup_share: float | None = None):
        self.seconds, self.floor, self.warmup_steps, self.warmup_share = seconds, floor, warmup_steps, warmup_share

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.start = time.monotonic()
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        progress = min(1.0, (time.monotonic() - self.start) / self.seconds)
        factor = min(1.0, (state.global_step + 1) / self.warmup_steps)
        if self.warmup_share is not None:
            factor = min(factor, progress / self.warmup_share) if progress < self.warmup_share else 1.0
        factor *= self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def on_step_end(self, args, state, control, **kwargs):
        # Steps are queued on a GPU; without this the clock would run ahead of them
        if torch.cuda.is_available() and state.global_step % 10 == 0:
            torch.cuda.synchronize()
        if time.monotonic() - self.start >= self.seconds:
            control.should_training_stop = True


def train_stage(model, stage: str, minutes: float, batch_size: int, learning_rate: float, **options) -> dict:
    """
    One stage of a converted model, for so many minutes. Other arguments are those of the trainer or, under `arguments`, of its
    arguments; `trainer_class` is that of a converted model.
    """
    arguments, on_gpu = options.pop("arguments", {}), torch.cuda.is_available()
    trainer_class = options.pop("trainer_class", GMADistillationTrainer)
    schedule = TimedSchedule(60 * minutes, floor=0.1, warmup_steps=10, warmup_share=0.03)
    fixed = {
        "lr_scheduler_type": "constant", "max_steps": 10**6, "bf16": on_gpu, "use_cpu": not on_gpu, "save_strategy": "no",
        "report_to": "none", "logging_steps": 10, "weight_decay": 0.0, "adam_beta2": 0.95, "dataloader_pin_memory": on_gpu,
        "dataloader_drop_last": True, "disable_tqdm": True,
    }  # fmt: skip
    own = {"stage": stage, "learning_rate": learning_rate, "per_device_train_batch_size": batch_size, **arguments}
    with tempfile.TemporaryDirectory() as folder:
        args = GMADistillationArguments(output_dir=folder, **fixed, **own)
        trainer = trainer_class(model, args, callbacks=[schedule], **options)
        start = time.monotonic()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    undo_preparation(model)
    return {
        "stage": stage, "steps": trainer.state.global_step, "batch_size": batch_size, "learning_rate": learning_rate,
        **arguments, "seconds": round(time.monotonic() - start, 1),
        "losses": [round(loss, 5) for loss in losses[:: max(1, len(losses) // 20)]],
    }  # fmt: skip
