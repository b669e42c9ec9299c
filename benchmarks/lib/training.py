# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What the experiments with small models share: one way to train them, to time them, to keep rows and to show them."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from benchmarks.conversion.common import Results, device
from benchmarks.rivals.mixers import number_of_parameters
from gma_hf import GMAForCausalLM
from gma_hf.training.trainer import GMATrainer, GMATrainingArguments


# One colour per mixer, the same in every figure: GMA in blue, softmax in black, the rivals between
COLOURS = {
    "softmax": "#222222",
    "elu": "#b8860b",
    "performer": "#c2571a",
    "mamba2": "#2e7d4f",
    "gma_paper": "#7fb2e5",
    "gma_gated": "#1f5fa8",
}


def equal_width(mixer: str, sizes: dict, reference: str, reference_sizes: dict, model_class=GMAForCausalLM) -> int:
    """
    The width of the MLP that makes a model as large as another one, where more than the mixer may differ between the two
    (`mixers.equal_intermediate_size` is the function for the usual case).

    Args:
        mixer, sizes: as `make_config` takes them; `intermediate_size` is not looked at.
        reference, reference_sizes: the model whose number of parameters is the target.
        model_class: of both.

    Returns:
        The width, a multiple of 8.

    Raises:
        ValueError: if the sizes would differ by more than 3%.
    """
    target = number_of_parameters(reference, model_class, **reference_sizes)
    smallest, next_smallest = (
        number_of_parameters(mixer, model_class, **{**sizes, "intermediate_size": width}) for width in (8, 16)
    )
    steps = next_smallest - smallest
    extra = 0 if steps == 0 else max(0, round((target - smallest) / steps))
    difference = smallest + extra * steps - target
    if abs(difference) > 0.03 * target:
        raise ValueError(
            f"{mixer} differs from {reference} by {difference / target:+.1%} in parameters, whatever the width of its MLP. "
            "Choose larger layers, or another reference."
        )
    return 8 + 8 * extra


class StepTimes(TrainerCallback):
    """Seconds of every step: forward pass, backward pass and update; loading of data and evaluations are not in it."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    @property
    def milliseconds(self) -> float:
        """The median of the steps behind the first fifth, in which kernels are compiled and memory is allocated."""
        return 1e3 * statistics.median(self.seconds[len(self.seconds) // 5 :])


class Curve(TrainerCallback):
    """A score, every so many steps and at the end."""

    def __init__(self, score: Callable[[], float], every: int):
        self.score, self.every = score, every
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.points.append((state.global_step, round(self.score(), 5)))
            print(f"  step {state.global_step}: {self.points[-1][1]:.4f}", flush=True)


def train(
    model: PreTrainedModel,
    dataset,
    collate: Callable,
    recipe: dict,
    seed: int,
    score: Callable[[], float],
    trainer_class: type[GMATrainer] = GMATrainer,
    compile: bool = False,
    **arguments,
) -> dict:
    """
    Train a model with AdamW, a linear warm-up over a tenth of the steps and a cosine, in bfloat16 autocast on a GPU.

    Args:
        model: is trained in place and ends on the device.
        dataset, collate: what `Trainer` takes.
        recipe: `steps`, `batch_size` (examples), `learning_rate`, `weight_decay`.
        seed: of the order of the data and of dropout.
        score: the score to follow, eight times over the training.
        trainer_class: a `GMATrainer`.
        compile: every block by torch.compile.
        arguments: others of `GMATrainingArguments`.

    Returns:
        What the training cost and how it went, as entries of a row.
    """
    if compile:
        torch._dynamo.reset()
        for layer in model.base_model.layers:
            layer.compile(dynamic=True)  # batches differ in length
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, steps = StepTimes(), recipe["steps"]
    curve = Curve(score, max(1, steps // 8))
    with tempfile.TemporaryDirectory() as folder:
        args = GMATrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=recipe["batch_size"],
            learning_rate=recipe["learning_rate"],
            weight_decay=recipe["weight_decay"],
            adam_beta2=0.98,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            seed=seed,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            dataloader_pin_memory=on_gpu,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            logging_steps=max(1, steps // 40),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        )
        trainer = trainer_class(model, args, train_dataset=dataset, data_collator=collate, callbacks=[times, curve])
        trainer.remove_callback(PrinterCallback)
        start = time.monotonic()
        trainer.train()
        losses = [[entry["step"], round(entry["loss"], 4)] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": model.num_parameters(),
        "train_seconds": round(time.monotonic() - start, 1),
        "ms_per_step": round(times.milliseconds, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "compile": compile,
        "losses": losses,
        "curve": curve.points,
    }


@contextmanager
def evaluating(model: PreTrainedModel):
    """The model in evaluation mode, without gradients, under the autocast of the training, and never compiled."""
    was_training = model.training
    model.eval()
    autocast = torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available())
    with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
        yield
    model.train(was_training)


def measure(results: Results, name: str, recipe: dict, function: Callable[[], dict]) -> dict:
    """The row of that name, measured now if it is not there; a row that was trained in another way ends the program."""
    if name in results.rows and results.rows[name]["recipe"] != recipe:
        sys.exit(
            f"error: {results.path} holds the row {name!r} with the recipe {results.rows[name]['recipe']}, not {recipe}. "
            "Choose another --output."
        )
    return results.measure(name, lambda: {"recipe": recipe, **function()})


def save_figure(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    print(f"written to {path}")
