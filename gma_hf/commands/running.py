# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The end of every command: an error that the user can fix is one line without a traceback, and Ctrl-C says how to continue.
"""

import errno
import os
import sys
from collections.abc import Callable

from ..analysis.errors import AnalysisError
from ..training.errors import NonFiniteTrainingError, TrainingInputError


INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended: 128 and the number of the signal
# Errors of a file system that is full, read-only or not writable for the user
REFUSALS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR")
    if hasattr(errno, name)
}


def run(main: Callable[[], None]) -> None:
    """
    Run a command. Input errors, NaNs and a full disk end it with one message and exit code 1, Ctrl-C with exit code 130.

    Args:
        main (`Callable`): the command.
    """
    try:
        main()
    except (TrainingInputError, NonFiniteTrainingError, AnalysisError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        print(f"interrupted. {error.args[0] if error.args else 'Nothing was written.'}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        refusal = refused_by_file_system(error)
        if refusal is None:
            raise
        sys.exit(f"error: {refusal} Files that were half written are removed; what was there before is unchanged.")


def refused_by_file_system(error: BaseException | None) -> str | None:
    """The message for an error of the file system, also if a library wraps it in another error; `None` for other errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            where = f" {error.filename}" if error.filename else ""
            return f"cannot write{where}: {os.strerror(error.errno)}."
        text = str(error)
        for number in REFUSALS:
            if os.strerror(number) in text or f"(os error {number})" in text:
                return f"cannot write: {os.strerror(number)}."
        if "PytorchStreamWriter failed" in text or "unexpected pos" in text:  # torch.save keeps no reason
            return "cannot write a file of PyTorch: is the disk full?"
        error = error.__cause__ or error.__context__
    return None


def expect_one_process() -> None:
    """
    Refuse several processes, which would all write the same folder.

    Raises:
        TrainingInputError: if several processes were started.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        raise TrainingInputError(
            f"{num_processes} processes were started, but this command works in one. Start it without `accelerate launch`."
        )
