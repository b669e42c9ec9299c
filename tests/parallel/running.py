"""Many cases in one start of several processes: `python -m torch.distributed.run ... tests/parallel/running.py MODULE`."""

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A fact, checked by all processes together: the function raises where it does not hold."""

    name: str
    check: Callable[[], None]


def main(modules: list[str], results: Path, chosen: str = "") -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    told = {}
    for module in modules:
        for case in importlib.import_module(module).CASES:
            if chosen not in case.name:
                continue
            try:
                case.check()
                error = None
            except Exception:
                error = traceback.format_exc()
            # All processes go on together, or the next case would talk to a process that is still in this one
            errors = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error)
            told[case.name] = next((error for error in errors if error), None)
            if dist.get_rank() == 0:
                results.write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2].split(","), Path(sys.argv[1]), *sys.argv[3:])
