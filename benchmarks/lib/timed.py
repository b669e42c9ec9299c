# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Trainings that end on time: the learning rate follows the clock."""

import math
import time

import torch
from transformers import TrainerCallback


class TimedSchedule(TrainerCallback):
    """
    A warm-up and half a cosine over a given time, and then the end, at which the share `floor` of the learning rate is left. The
    warm-up ends after some steps; `warmup_share` of the time bounds it, too, and the rate within it.
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
