# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The output of a command during a training: the step, the remaining time, and the measurements, as numbers."""

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer


class ProgressLines(ProgressCallback):
    """
    The bar of Transformers, and one readable line for each report of the trainer; without a bar, only the lines.

    Args:
        with_bar (`bool`): whether to draw the bar.
    """

    def __init__(self, with_bar: bool = True):
        super().__init__()
        self.with_bar = with_bar
        self.start: tuple[float, int] | None = None  # when this process began to train, and at which step

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = (time.monotonic(), state.global_step)
        if self.with_bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.with_bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.with_bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        line = f"{self._place(state)}{readable(logs)}"
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        self.start = None
        if self.with_bar:
            super().on_train_end(args, state, control, **kwargs)

    def _place(self, state) -> str:
        """`step 20 of 280, 2:10 left: `; empty outside of the training."""
        if self.start is None or state.max_steps < 1:
            return ""
        since, first_step = self.start
        done, left = state.global_step - first_step, state.max_steps - state.global_step
        time_left = f", {clock((time.monotonic() - since) / done * left)} left" if done > 0 and left > 0 else ""
        return f"step {state.global_step:,} of {state.max_steps:,}{time_left}: "


def show_progress(trainer: Trainer) -> None:
    """Let a trainer report by `ProgressLines` instead of printing dictionaries."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLines(with_bar=not trainer.args.disable_tqdm))


def readable(logs: dict[str, Any]) -> str:
    """`loss 5.795, learning rate 0.003948`: names as words, numbers with four digits."""
    shown = {name: value for name, value in logs.items() if name != "total_flos"}
    return ", ".join(
        f"{name.replace('_', ' ').replace('/', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in shown.items()
    )


def clock(seconds: float) -> str:
    """`2:10`, or `1:02:10` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
