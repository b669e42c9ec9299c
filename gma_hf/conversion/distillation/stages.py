# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""All stages of a distillation, one after the other. After an interruption, the same call continues."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...training.checkpoints import checkpoint_to_resume
from ...training.files import write_json
from ...training.fingerprint import fingerprint
from ...training.run_folder import RunFolder
from .arguments import GMADistillationArguments
from .trainer import GMADistillationTrainer


logger = logging.getLogger(__name__)

STATE_FILE = "distillation_state.json"


@dataclasses.dataclass
class StageResult:
    """
    A finished stage.

    Args:
        stage (`str`): name of the stage.
        folder (`str`): name of its folder in the output folder, with its model and checkpoints.
        steps (`int`): number of optimization steps.
        seconds (`float`): duration of the training since its last start.
        metrics (`dict[str, float]`): metrics of the evaluation at its end, named `eval_...`; empty without evaluation data.
    """

    stage: str
    folder: str
    steps: int
    seconds: float
    metrics: dict[str, float]


def distill(
    model: PreTrainedModel,
    stages: Sequence[GMADistillationArguments],
    output_dir: str | Path,
    *,
    teacher: PreTrainedModel | None = None,
    peft_config: Any = None,
    stage_options: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> list[StageResult]:
    """
    Train a converted model stage by stage, in place. Each stage has its own folder in `output_dir`, with its checkpoints
    and, at the end, its model. After an interruption, call the function again: it skips finished stages, and continues the
    interrupted stage from its last checkpoint.

    Args:
        model (`PreTrainedModel`): a calibrated model, see [`calibrate`].
        stages (`Sequence[GMADistillationArguments]`): the stages in order. Their `output_dir` is replaced.
        output_dir (`str` or `Path`): the folder of the run.
        teacher (`PreTrainedModel`, *optional*): the model before its conversion, see [`GMADistillationTrainer`].
        peft_config (`PeftConfig`, *optional*): adapters for the stage "finetune", for example a `peft.LoraConfig`. The stage
            trains the adapters instead of all weights, and then merges them into the weights.
        stage_options (`Mapping[str, Mapping]`, *optional*): from names of stages to arguments of the trainer for this stage
            only.
        options (`Any`, *optional*): arguments of [`GMADistillationTrainer`] for all stages: `train_dataset`, `eval_dataset`,
            `data_collator`, ...

    Returns:
        `list[StageResult]`: all stages, including the stages that were finished before this call.

    Raises:
        ValueError: if the folder contains a run with other stages or with other arguments of a stage; see also
            [`GMADistillationTrainer`].
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = read_state(output_dir, [args.stage for args in stages])
    if results:
        logger.info("Finished before: %s.", ", ".join(result.stage for result in results))
        load_weights(model, output_dir / results[-1].folder)
    runs = []
    for number, args in enumerate(stages, 1):
        args.output_dir = str(output_dir / f"{number}-{args.stage}")
        runs.append(RunFolder(args.output_dir, fingerprint("distill", [args], {}), is_main=args.process_index == 0))
    for args, run in list(zip(stages, runs, strict=True))[len(results) :]:
        name = run.folder.name
        checkpoint = checkpoint_to_resume(args.output_dir)
        run.begin()
        trained, with_adapters = model, peft_config is not None and args.stage == "finetune"
        if with_adapters:
            from peft import get_peft_model

            trained = get_peft_model(model, peft_config)
        specific = (stage_options or {}).get(args.stage, {})
        # The last stage has its own loss, and a teacher would only take memory
        taught = {} if args.stage == "finetune" else {"teacher": teacher}
        trainer = GMADistillationTrainer(trained, args, **taught, **{**options, **specific})
        training = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        if with_adapters:
            model = trained.merge_and_unload()
            if trainer.is_world_process_zero():
                model.save_pretrained(args.output_dir)
        else:
            trainer.save_model()
        results.append(
            StageResult(args.stage, name, trainer.state.global_step, training.metrics["train_runtime"], metrics)
        )
        if trainer.is_world_process_zero():
            write_json(output_dir / STATE_FILE, [dataclasses.asdict(result) for result in results])
        trainer.accelerator.wait_for_everyone()
    model.requires_grad_(True)
    return results


def read_state(output_dir: Path, stages: list[str]) -> list[StageResult]:
    """
    The finished stages of a run.

    Raises:
        ValueError: if the finished stages are not the first of the given stages.
    """
    path = output_dir / STATE_FILE
    if not path.is_file():
        return []
    results = [StageResult(**entry) for entry in json.loads(path.read_text("utf-8"))]
    finished = [result.stage for result in results]
    if finished != stages[: len(finished)]:
        raise ValueError(
            f"{output_dir} holds a run that finished the stages {', '.join(finished)}, but asked for are "
            f"{', '.join(stages) or 'none'}. Choose another output folder, or delete this one."
        )
    return results


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a converted model the weights that were saved in a folder."""
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
