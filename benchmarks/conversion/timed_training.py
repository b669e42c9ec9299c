# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A training of converted models that ends on time."""

import math
import tempfile
import time

import torch
from transformers import TrainerCallback

from gma_hf.conversion.distillation.arguments import GMADistillationArguments
from gma_hf.conversion.distillation.trainer import GMADistillationTrainer, undo_preparation


WARMUP = 0.03  # of the time


class TimedSchedule(TrainerCallback):
    """A warm-up and half a cosine down to a tenth over a given time, and then the end."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.start = time.monotonic()
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        progress = min(1.0, (time.monotonic() - self.start) / self.seconds)
        factor = min((state.global_step + 1) / 10, progress / WARMUP, 1.0) if progress < WARMUP else 1.0
        factor *= 0.55 + 0.45 * math.cos(math.pi * progress)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def on_step_end(self, args, state, control, **kwargs):
        # Steps are queued on a GPU; without this the clock would run ahead of them
        if torch.cuda.is_available() and state.global_step % 10 == 0:
            torch.cuda.synchronize()
        if time.monotonic() - self.start >= self.seconds:
            control.should_training_stop = True


def train(model, stage: str, minutes: float, batch_size: int, learning_rate: float, **options) -> dict:
    """
    One stage, for so many minutes. Other arguments are those of the trainer or, under `arguments`, of its arguments;
    `trainer_class` is that of a converted model.
    """
    arguments = options.pop("arguments", {})
    trainer_class = options.pop("trainer_class", GMADistillationTrainer)
    with tempfile.TemporaryDirectory() as folder:
        args = GMADistillationArguments(
            output_dir=folder,
            stage=stage,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="constant",
            max_steps=10**6,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            weight_decay=0.0,
            adam_beta2=0.95,
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_drop_last=True,
            disable_tqdm=True,
            **arguments,
        )
        trainer = trainer_class(model, args, callbacks=[TimedSchedule(60 * minutes)], **options)
        start = time.monotonic()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    undo_preparation(model)
    return {
        "stage": stage,
        "steps": trainer.state.global_step,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        **arguments,
        "seconds": round(time.monotonic() - start, 1),
        "losses": [round(loss, 5) for loss in losses[:: max(1, len(losses) // 20)]],
    }
