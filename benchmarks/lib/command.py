# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line of every benchmark: its options, what it measures, and the report of what was measured."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.lib.results import COMMITTED, FIGURES, short_device_name
from benchmarks.lib.tables import save_figure


def command(
    doc: str,
    name: str,
    add_options: Callable[[Callable], None],
    measure: Callable[[argparse.Namespace], None],
    tables: Callable[[dict], str],
    figures: Callable[[dict], object] | None = None,
    needs: tuple[str, ...] = (),
    prepare: Callable[[argparse.Namespace], object] | None = None,
    needs_gpu: bool = False,
) -> None:
    """
    Run a benchmark: measure what its file does not hold yet, and print the tables. No benchmark writes to
    `benchmarks/results` or `docs/figures` unless `--output` names a file there.

    Args:
        doc (`str`): what `--help` says.
        name (`str`): the name of the results without `.json`; a `*` stands for the device.
        add_options (`Callable`): is given `add_argument` of the parser.
        measure (`Callable`): is given the options, `output` among them, and writes that file.
        tables (`Callable`): the tables of the content of a file.
        figures (`Callable`, *optional*): the figure of that content, or several by name.
        needs (`tuple`, *optional*): the options without which nothing can be measured.
        prepare (`Callable`, *optional*): what `--prepare FILE --data FOLDER` does before anything can be measured.
        needs_gpu (`bool`, *optional*, defaults to `False`): whether it measures on a GPU only.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser.add_argument)
    add_output_options(parser, name)
    if prepare is not None:
        parser.add_argument("--data", type=Path, help="folder of the data sets, for --prepare")
        parser.add_argument("--prepare", type=Path, metavar="FILE", help="tokenize into this file, and nothing else")
        parser.add_argument("--prepared", type=Path, metavar="FILE", help="the file that --prepare wrote")
    if figures is not None:
        parser.add_argument("--plot", action="store_true", help="draw the figures, too, beside the file of results")
    options = parser.parse_args()
    if prepare is not None and options.prepare is not None:
        if options.data is None:
            parser.error("--prepare needs --data, the folder of the data sets")
        return print(prepare(options) or options.prepare)
    if not options.table:
        if needs_gpu and not torch.cuda.is_available():
            sys.exit(
                "error: This benchmark needs an NVIDIA GPU, and torch.cuda.is_available() is False. --table prints the "
                "committed results; benchmarks/kernels/attention_cpu.py measures the operator on a CPU."
            )
        missing = [option for option in needs if getattr(options, option) is None]
        if missing:
            parser.error(
                f"measuring needs {' and '.join(f'--{option}' for option in missing)}; --help says what they are"
            )
        options.output = output_path(options)
        measure(options)
    for path in stored(options):
        content = json.loads(path.read_text(encoding="utf-8"))
        print(f"\n{path}\n\n{tables(content)}")
        if figures is not None and options.plot:
            folder = FIGURES if path.parent.resolve() == COMMITTED else path.parent
            drawn = figures(content)
            for title, figure in (drawn if isinstance(drawn, dict) else {name: drawn}).items():
                save_figure(figure, folder / f"{path.stem if '*' in title else title}.png")


def add_output_options(parser: argparse.ArgumentParser, name: str) -> None:
    parser.set_defaults(results_name=name)
    default = name.replace("*", "DEVICE")
    parser.add_argument(
        "--output", type=Path,
        help=f"JSON file for the rows; rows that it holds are not measured again. Default: {default}.json in the current folder. "
        "The committed results are in benchmarks/results",
    )  # fmt: skip
    parser.add_argument(
        "--renew", action="store_true", help="measure everything again, in the place of --output's rows"
    )
    parser.add_argument(
        "--table", action="store_true", help="only print the tables: of --output, or the committed ones"
    )


def output_path(options: argparse.Namespace) -> Path:
    """The file that a run writes; with `--renew` it is empty at first."""
    device = "cpu" if getattr(options, "device", None) == "cpu" else short_device_name()
    path = options.output or Path(options.results_name.replace("*", device) + ".json")
    if options.renew:
        path.unlink(missing_ok=True)
    return path


def stored(options: argparse.Namespace) -> list[Path]:
    """The files whose tables are printed. SystemExit if there are none."""
    files = [options.output] if options.output else sorted(COMMITTED.glob(f"{options.results_name}.json"))
    files = [path for path in files if path.is_file()]
    if not files:
        missing = options.output or COMMITTED / options.results_name
        sys.exit(f"error: {missing} does not exist: nothing was measured yet.")
    return files
