# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
One rule for every command that writes a folder.

- A folder that holds something is refused, unless it holds this very run: `run.json`, which is written when the work begins,
  says of which command, options and data the run is.
- A finished run says so and does nothing.
- A step that fails leaves everything as it was: what takes one step is written under a temporary name beside the folder, and
  gets its final name when it is whole.
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
    """The folder of one run. Used as a context manager, so that temporary folders go when the run ends.

    Args:
        folder: where the run writes.
        run: what `fingerprint` returns.
        overwrite: take a folder that holds something else; its files stay until `begin`.
        is_main: whether this process writes; the others only look.

    Raises:
        TrainingInputError: if the folder is a file, or holds something other than this run.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any], overwrite: bool = False, is_main: bool = True):
        self.folder = Path(folder).expanduser()
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
        """Return a temporary folder beside the run's folder, which goes when the run ends. The caller makes the folder."""
        place = self.folder.resolve()
        path = place.with_name(f".{place.name}.{purpose}")
        if path not in self.temporary:
            self.temporary.append(path)
            if self.is_main:
                shutil.rmtree(path, ignore_errors=True)
        return path

    def begin(self) -> None:
        """Note in the folder that this run works there."""
        if self.is_main and not self.is_continued:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RUN_FILE, {**self.run, "finished": False})

    def finish(self) -> None:
        """Note in the folder that this run is finished."""
        if self.is_main:
            write_json(self.folder / RUN_FILE, {**self.run, "finished": True})

    def put_in_place(self, written: Path) -> None:
        """Give a whole, finished folder from `beside` the run's own name."""
        if not self.is_main:
            return
        write_json(written / RUN_FILE, {**self.run, "finished": True})
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.is_dir():
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            self.folder.rmdir()
        written.rename(self.folder)

    def _expect_this_run(self) -> dict[str, Any] | None:
        """Return what the folder says of this run; None for a folder that is missing or empty."""
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
    """Return what `run.json` of a folder says, or None where there is none that can be read."""
    try:
        return json.loads((Path(folder) / RUN_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
