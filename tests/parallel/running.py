"""Many cases in one start of several processes, which share what was imported before they were forked."""

import importlib
import json
import multiprocessing
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


def run_process(rank: int, size: int, modules: list[str], folder: Path, chosen: str) -> None:
    """Check all cases, and write what happened into `rank.json`, case by case."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    told = {}
    for module in modules:
        for case in importlib.import_module(module).CASES:
            if chosen not in case.name:
                continue
            try:
                case.check()
                told[case.name] = None
            except BaseException:
                told[case.name] = traceback.format_exc()
            (folder / f"{rank}.json").write_text(json.dumps(told))
            # All processes go on together, or the next case would talk to a process that is still in this one
            failed = torch.tensor(float(told[case.name] is not None))
            dist.all_reduce(failed)
    dist.destroy_process_group()


def main(size: int, modules: list[str], folder: Path, chosen: str = "") -> None:
    for module in modules:
        importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_process, args=(rank, size, modules, folder, chosen)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3]), *sys.argv[4:])
