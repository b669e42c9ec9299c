# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How the experiments with small models train and evaluate: one way for all of them."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from benchmarks.lib.results import device
from gma_hf.training.trainer import GMATrainer, GMATrainingArguments


class Watch(TrainerCallback):
    """Seconds of every step (forward pass, backward pass and update), and a score eight times over the training."""

    def __init__(self, score: Callable[[], float] | None, steps: int):
        self.score, self.every = score, max(1, steps // 8)
        self.seconds: list[float] = []
        self.points: list[tuple[int, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        is_due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if self.score is not None and is_due:
            self.points.append((state.global_step, round(self.score(), 5)))
            step, score = self.points[-1]
            print(f"  step {step}: {score:.4f}, {self.milliseconds:.1f} ms a step", flush=True)

    @property
    def milliseconds(self) -> float:
        """The median of the steps behind the first fifth, in which kernels are compiled and memory is allocated."""
        return 1e3 * statistics.median(self.seconds[len(self.seconds) // 5 :])


def compile_blocks(model: PreTrainedModel, dynamic: bool) -> None:
    """Compile block by block; every row has shapes of its own, so nothing is kept from the row before."""
    torch._dynamo.reset()
    norm = getattr(model.base_model, "norm", None)
    for module in (*model.base_model.layers, *(() if norm is None else (norm,))):
        module.compile(dynamic=dynamic)


def train(
    model: PreTrainedModel,
    dataset,
    collate: Callable,
    recipe: dict,
    seed: int,
    score: Callable[[], float] | None,
    trainer_class: type[Trainer] = GMATrainer,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments,
) -> dict:
    """
    Train a model in place with AdamW, a linear warm-up over a tenth of the steps and a cosine, in bfloat16 autocast on a GPU.

    Args:
        recipe: `steps`, `batch_size` (examples), `learning_rate`, `weight_decay`.
        score: the score to follow, eight times over the training; None for none.
        arguments: others of `GMATrainingArguments`; they win over those above.

    Returns:
        `dict`: what the training cost and how it went, as entries of a row.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    steps = recipe["steps"]
    watch = Watch(score, steps)
    defaults = {
        "adam_beta2": 0.98, "lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 10),
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch", "dataloader_pin_memory": on_gpu,
        "dataloader_drop_last": True, "remove_unused_columns": False, "logging_steps": max(1, steps // 40),
        "logging_nan_inf_filter": False,  # it waits for the GPU at every step
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": on_gpu, "use_cpu": not on_gpu,
        "max_steps": steps, "per_device_train_batch_size": recipe["batch_size"], "learning_rate": recipe["learning_rate"],
        "weight_decay": recipe["weight_decay"], "seed": seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = GMATrainingArguments(output_dir=folder, **{**defaults, **arguments})
        trainer = trainer_class(
            model, args, train_dataset=dataset, data_collator=collate, callbacks=[watch, *callbacks]
        )
        trainer.remove_callback(PrinterCallback)
        start = time.monotonic()
        trainer.train()
        losses = [[entry["step"], round(entry["loss"], 4)] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "train_seconds": round(time.monotonic() - start, 1),
        "ms_per_step": round(watch.milliseconds, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "losses": losses,
        "curve": watch.points,
    }


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode, without gradients, under the autocast of the training, and never compiled."""
    was_training = model.training
    model.eval()
    autocast = torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available())
    with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
        yield
    model.train(was_training)
