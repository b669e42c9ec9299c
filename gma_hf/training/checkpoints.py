# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints of a training: which are complete, which are damaged, and from which a training can continue."""

import json
import logging
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import TrainingInputError


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
# Files with the state of the optimizer from Trainer, FSDP and DeepSpeed
OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


def complete_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a folder with the state of the Trainer, which is written last; the newest first."""
    found = [path for path in all_checkpoints(output_dir) if (path / STATE_FILE).is_file()]
    return sorted(found, key=_step, reverse=True)


def all_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Every folder of a checkpoint, complete or incomplete."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    return [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]


def find_last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    Find the newest checkpoint of a folder that is complete and not damaged. A checkpoint is complete if it has the state of
    the Trainer, which is written last.

    Args:
        output_dir (`str` or `os.PathLike`): the output folder of the run.

    Returns:
        `str` or `None`: the folder of the checkpoint; `None` if there is none.
    """
    return next((str(path) for path in complete_checkpoints(output_dir) if damage_of(path) is None), None)


def damage_of(checkpoint: str | os.PathLike) -> str | None:
    """
    The file of a checkpoint that cannot be read, for example because the disk was full; `None` if all files can be read.
    """
    folder = Path(checkpoint)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass  # the header says how long the file must be
        except (SafetensorError, OSError):
            return path.name
    for path in sorted(folder.glob("*.index.json")):
        try:
            shards = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, OSError):
            return path.name
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            return missing[0]
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("optimizer.bin")]):
        # torch.save writes a zip archive, whose table of contents stands at the end
        if not zipfile.is_zipfile(path):
            return path.name
    for path in sorted({folder / STATE_FILE, *folder.glob("*.json")}):
        try:
            json.loads(path.read_text("utf-8"))
        except (ValueError, OSError):
            return path.name
    return None


def lacks_optimizer(checkpoint: str | os.PathLike) -> str | None:
    """
    The state of the optimization that a checkpoint lacks, so that `Trainer` would start it anew; `None` if nothing is
    missing.
    """
    folder = Path(checkpoint)
    if not any(any(folder.glob(pattern)) for pattern in OPTIMIZER_STATES):
        return "optimizer.pt"
    if not any(folder.glob("global_step*")) and not (folder / "scheduler.pt").is_file():
        return "scheduler.pt"
    return None


def expect_resumable(checkpoint: str | os.PathLike) -> None:
    """
    Check that a training can continue from a checkpoint as if it had not stopped.

    Raises:
        TrainingInputError: if the checkpoint is incomplete or damaged, or lacks the state of the optimizer.
    """
    if not (Path(checkpoint) / STATE_FILE).is_file():
        raise TrainingInputError(
            f"{str(checkpoint)!r} is not a complete checkpoint (it has no {STATE_FILE}). Choose another one."
        )
    damaged, lacking = damage_of(checkpoint), lacks_optimizer(checkpoint)
    if damaged is not None:
        raise TrainingInputError(
            f"The checkpoint {str(checkpoint)!r} is damaged: {damaged} cannot be read. Choose another one."
        )
    if lacking is not None:
        raise TrainingInputError(_without_optimizer(checkpoint, lacking))


def checkpoint_to_resume(output_dir: str | os.PathLike) -> str | None:
    """
    The newest checkpoint from which a training can continue; `None` if the folder has none. Damaged checkpoints are skipped,
    with a warning.

    Raises:
        TrainingInputError: if every readable checkpoint lacks the state of the optimizer.
    """
    without_optimizer = None
    for path in complete_checkpoints(output_dir):
        damaged, lacking = damage_of(path), lacks_optimizer(path)
        if damaged is not None:
            logger.warning("%s is damaged (%s cannot be read); looking for the checkpoint before.", path, damaged)
        elif lacking is not None:
            without_optimizer = without_optimizer or _without_optimizer(path, lacking)
        else:
            return str(path)
    if without_optimizer is not None:
        raise TrainingInputError(without_optimizer)
    return None


def _without_optimizer(checkpoint: str | os.PathLike, lacking: str) -> str:
    return (
        f"{str(checkpoint)!r} has no {lacking}, so the training cannot continue from it as if it had not stopped. To start with its "
        f"weights and a new optimizer, pass --model_name_or_path {checkpoint} and another --output_dir."
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])
