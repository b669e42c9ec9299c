# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What both conversions do with a model: convert, calibrate, two stages of distillation, each for so many minutes."""

import tempfile
import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.lib.timed import TimedSchedule
from gma_hf import convert_to_gma
from gma_hf.conversion.calibration.calibrate import calibrate
from gma_hf.conversion.distillation.arguments import GMADistillationArguments
from gma_hf.conversion.distillation.trainer import GMADistillationTrainer, undo_preparation


def convert_and_distil(
    model, data: dict, score: Callable[[str], None], options: dict, layers=None, *, batches: Iterable | None,
    calibration: dict, minutes: float, batch_size: int, transfer_share: float, transfer_rate: float, rate: float,
    arguments: dict,
) -> dict:  # fmt: skip
    """
    Convert a model in place and train it; `stages`, and `calibration` if there was one, as entries of a row.

    Args:
        data: what the trainer reads: `train_dataset`, `data_collator` and `teacher`.
        score: is told the state of the model after every step but the last.
        options, layers: as `convert_to_gma` takes them.
        batches, calibration: of `calibrate`; without batches the mixtures stay random.
        minutes, transfer_share: of the training, and the share of the first stage, the transfer of attention.
        transfer_rate, rate, arguments: learning rates of both stages, and further arguments of the second.
    """
    row = {}
    convert_to_gma(model, layers, **options)
    score("converted, random mixtures")
    if batches is not None:
        row["calibration"] = calibrate(model, batches, progress=False, **calibration).to_dict()
        score("calibrated")
    transfer = transfer_share * minutes
    first = train_stage(model, "attention_transfer", transfer, batch_size, transfer_rate, **data)
    score("after attention transfer")
    second = train_stage(model, "distillation", minutes - transfer, batch_size, rate, arguments=arguments, **data)
    return {**row, "stages": [first, second]}


def train_stage(
    model, stage: str, minutes: float, batch_size: int, learning_rate: float, *, arguments: dict | None = None,
    trainer_class=GMADistillationTrainer, **data,
) -> dict:  # fmt: skip
    """One stage of a converted model; `arguments` are further ones of `GMADistillationArguments`. What it was."""
    arguments, on_gpu = arguments or {}, torch.cuda.is_available()
    schedule = TimedSchedule(60 * minutes, floor=0.1, warmup_steps=10, warmup_share=0.03)
    with tempfile.TemporaryDirectory() as folder:
        args = GMADistillationArguments(
            output_dir=folder, lr_scheduler_type="constant", max_steps=10**6, bf16=on_gpu, use_cpu=not on_gpu,
            save_strategy="no", report_to="none", logging_steps=10, weight_decay=0.0, adam_beta2=0.95,
            dataloader_pin_memory=on_gpu, dataloader_drop_last=True, disable_tqdm=True, stage=stage,
            learning_rate=learning_rate, per_device_train_batch_size=batch_size, **arguments,
        )  # fmt: skip
        trainer = trainer_class(model, args, callbacks=[schedule], **data)
        start = time.monotonic()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    undo_preparation(model)
    return {
        "stage": stage, "steps": trainer.state.global_step, "batch_size": batch_size, "learning_rate": learning_rate,
        **arguments, "seconds": round(time.monotonic() - start, 1),
        "losses": [round(loss, 5) for loss in losses[:: max(1, len(losses) // 20)]],
    }  # fmt: skip
