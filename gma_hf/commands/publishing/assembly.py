# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
From the folder of a trained model to a folder for publication: copy the files that belong to it, and check everything.

The folder of the training is only read. Code in this folder is never run and never copied: the remote-code file is written
anew.
"""

import filecmp
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from ...remote_code import REMOTE_CODE_MODULE
from ...training.cards.frame import is_gma
from ...training.cards.published_card import check_metadata
from ...training.errors import TrainingInputError
from .contents import CARD_FILES, PUBLISHED, check_names_no_code, check_no_folders, check_sizes, check_source, choose
from .hub import read_card


@dataclass
class Assembly:
    """
    A folder that is ready for publication.

    Args:
        folder (`Path`): the folder.
        files (`dict[str, int]`): names and sizes in bytes.
        left_behind (`dict[str, str]`): files of the source that are not published, and why.
    """

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    left_behind: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


def assemble(
    source: str | Path,
    target: str | Path,
    card: str | Path | None = None,
    max_total_gb: float = 100.0,
    metadata: dict[str, str] | None = None,
) -> Assembly:
    """
    Copy the files of a published model into an empty folder, and check them.

    Args:
        source (`str` or `Path`): folder of the trained model; only read.
        target (`str` or `Path`): folder to fill. It must be empty or missing, and not inside of `source`.
        card (`str` or `Path`, *optional*): folder with the model card, the recipe and the results, which replace those of `source`.
        max_total_gb (`float`): largest size of the folder in gigabytes.
        metadata (`dict[str, str]`, *optional*): fields for the metadata of the copied card, such as `license`. The card of the source does not
            change.

    Returns:
        [`Assembly`]: the folder with its files.

    Raises:
        TrainingInputError: if the source is no finished model in safetensors, a file is too large, there is no valid model
            card, or a text names a local folder.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    check_source(source)
    if source == target or source in target.parents:
        raise TrainingInputError(
            f"{target} is inside of {source}, which must not change. Choose another output folder."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TrainingInputError(f"{target} is not empty. Choose another output folder, or empty it.")
    chosen, left_behind = choose(source, PUBLISHED)
    if card is not None:
        card = Path(card).resolve()
        if not card.is_dir():
            raise TrainingInputError(f"There is no folder {card}; --card is a folder with README.md and recipe.yaml.")
        from_card, _ = choose(card, CARD_FILES)
        chosen.update(from_card)
    if "README.md" not in chosen:
        raise TrainingInputError(
            f"Neither {source} nor --card has a README.md. gma-hf card writes one from measurements."
        )
    check_sizes(chosen, max_total_gb)
    check_names_no_code(chosen)

    was_there = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, path in chosen.items():
            shutil.copyfile(path, target / name)
        _write_remote_code(source, target, left_behind)
        model_card = read_card(target / "README.md")
        if metadata:
            for name, value in metadata.items():
                setattr(model_card.data, name, value)
            model_card.save(target / "README.md")
        check_metadata(model_card)
        check_no_folders(target, source)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        if was_there:
            target.mkdir()
        raise
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    return Assembly(target, files, left_behind)


def keep(assembly: Assembly, folder: str | Path) -> Assembly:
    """
    Move an assembled folder to its final place. A folder that is already there and has the same bits is kept.

    Args:
        assembly ([`Assembly`]): the folder.
        folder (`str` or `Path`): its final place.

    Raises:
        TrainingInputError: if there is something else at this place.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.is_dir() and any(folder.iterdir()):
        names = {path.name for path in folder.iterdir()}
        differing = sorted(names ^ set(assembly.files)) or [
            name for name in assembly.files if not filecmp.cmp(folder / name, assembly.folder / name, shallow=False)
        ]
        if differing:
            raise TrainingInputError(
                f"{folder} is not empty and differs from what would be published ({differing[0]}). Choose another output "
                "folder, or empty this one."
            )
        return Assembly(folder, assembly.files, assembly.left_behind)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        folder.rmdir()
    shutil.move(assembly.folder, folder)
    return Assembly(folder, assembly.files, assembly.left_behind)


def _write_remote_code(source: Path, target: Path, left_behind: dict[str, str]) -> None:
    """Write the remote-code file of a GMA model, and let its configuration name no other code."""
    config = AutoConfig.from_pretrained(target, trust_remote_code=False)
    name = f"{REMOTE_CODE_MODULE}.py"
    values = json.loads((target / "config.json").read_text(encoding="utf-8"))
    auto_map = None
    if is_gma(config):
        with tempfile.TemporaryDirectory() as work:
            config.save_pretrained(work)
            auto_map = config.auto_map
            shutil.copyfile(Path(work) / name, target / name)
    if values.get("auto_map") != auto_map:
        values.pop("auto_map", None)
        values |= {} if auto_map is None else {"auto_map": auto_map}
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    left_behind.pop(name, None)
    if (source / name).exists() and (
        not (target / name).exists() or not filecmp.cmp(source / name, target / name, shallow=False)
    ):
        left_behind[name] = "not what this version of gma_hf writes; it was not run, and is written anew"
