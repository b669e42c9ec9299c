# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The rule for every command that writes a folder:

- A folder with content is refused, unless it belongs to the same run. `run.json`, which is written when the work begins,
  records the command, the options and the data of the run.
- A finished run says that it is finished, and does nothing.
- A step that fails leaves everything as it was: its results are written under a temporary name beside the folder, and get
  their final name when they are complete.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from .errors import TrainingInputError
from .files import write_json
from .fingerprint import differences


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
MAX_DIFFERENCES = 5


class RunFolder:
    """
    The folder of one run, as a context manager that removes temporary folders when the run ends.

    Args:
        folder (`str` or `Path`): the folder of the run.
        run (`dict`): the result of `fingerprint`.
        overwrite (`bool`): whether to take a folder with other content; its files stay until `begin`.
        is_main (`bool`): whether this process writes. Other processes only check.

    Raises:
        TrainingInputError: if the folder is a file, a link to nothing, or has something else than this run.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any], overwrite: bool = False, is_main: bool = True):
        self.folder = Path(folder).expanduser()
        if self.folder.is_symlink():  # the results belong where the link points to
            if not self.folder.exists():
                raise TrainingInputError(
                    f"{folder} is a link to {self.folder.resolve()}, which does not exist. Make this folder first."
                )
            self.folder = self.folder.resolve()
        self.run = run
        self.is_main = is_main
        self.temporary: list[Path] = []
        occupied = next((p for p in [self.folder, *self.folder.parents] if p.exists() and not p.is_dir()), None)
        if occupied is not None:
            raise TrainingInputError(f"{occupied} is a file. Give a folder to write to.")
        before = None if overwrite else self._expect_this_run()
        self.is_continued = before is not None
        self.is_finished = bool(before and before.get("finished"))
        if self.is_finished:
            logger.info(
                "This run is finished: %s holds its result. Nothing is done. Choose another folder to run it again.",
                folder,
            )

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, trace):
        for path in self.temporary if self.is_main else ():
            shutil.rmtree(path, ignore_errors=True)

    def beside(self, purpose: str) -> Path:
        """A temporary folder beside the folder of the run, removed when the run ends. The caller creates it."""
        place = self.folder.resolve()
        path = place.with_name(f".{place.name}.{purpose}")
        if path not in self.temporary:
            self.temporary.append(path)
            if self.is_main:
                shutil.rmtree(path, ignore_errors=True)
        return path

    def begin(self) -> None:
        """Record in the folder that this run works there."""
        if self.is_main and not self.is_continued:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RUN_FILE, {**self.run, "finished": False})

    def finish(self) -> None:
        """Record in the folder that this run is finished."""
        if self.is_main:
            write_json(self.folder / RUN_FILE, {**self.run, "finished": True})

    def put_in_place(self, written: Path) -> None:
        """Give a complete folder from `beside` the name of the run."""
        if not self.is_main:
            return
        write_json(written / RUN_FILE, {**self.run, "finished": True})
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.is_dir():
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            self.folder.rmdir()
        written.rename(self.folder)

    def _expect_this_run(self) -> dict[str, Any] | None:
        """The record of this run in the folder; `None` for a missing or empty folder."""
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return None
        before = read_run(self.folder)
        if before is None:
            raise TrainingInputError(
                f"{self.folder} already holds something that this command did not write, and would be overwritten. Choose "
                f"another folder, or empty this one.{self._overwriting()}"
            )
        found = differences(before, self.run)
        if found:
            more = f" (and {len(found) - MAX_DIFFERENCES} more)" if len(found) > MAX_DIFFERENCES else ""
            raise TrainingInputError(
                f"{self.folder} holds another run: {'; '.join(found[:MAX_DIFFERENCES])}{more}. Choose another folder, or "
                f"give the same options and data to go on with that run.{self._overwriting()}"
            )
        return before

    def _overwriting(self) -> str:
        can_overwrite = self.run["command"].startswith("train-")
        return " To start anew in this folder, pass --overwrite_output_dir." if can_overwrite else ""


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """The content of `run.json` in a folder; `None` if there is none that can be read."""
    try:
        return json.loads((Path(folder) / RUN_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
