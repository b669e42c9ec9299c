# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Analyse how the Gaussian mixtures of a model route the tokens of a text, and write report.html and report.json.

    gma-hf analyze pretrained/gma-wikipedia-7m --text book.txt --output analysis

MODEL is a folder or Hub name of a GMA model or of a converted model. `--help` lists the options.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..analysis import analyze, write_report
from ..training.arguments import parse_arguments
from ..training.fingerprint import fingerprint
from ..training.options import check_options
from ..training.run_folder import RunFolder
from .running import expect_one_process
from .shared.analysis import load_model, load_tokenizer, read_texts


@dataclass
class AnalysisArguments:
    """The text to read, and the detail of the analysis."""

    text: list[str] = field(
        metadata={"help": "UTF-8 text files, plain or with .gz or .xz, read one after the other.", "required": True}
    )
    output: str = field(default="analysis", metadata={"help": "Folder for report.html and report.json."})
    max_tokens: int = field(default=100_000, metadata={"help": "Largest number of tokens to read; 0: all."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per forward pass. Default: 512, or less if the model takes less."}
    )
    batch_size: int = field(default=8, metadata={"help": "Blocks per forward pass."})
    excerpt_length: int = field(
        default=32, metadata={"help": "Tokens at the beginning of the text to analyse one by one."}
    )
    token: int | None = field(
        default=None,
        metadata={"help": "The token of the excerpt whose route is drawn, from 0. Default: the last whole word."},
    )
    num_shuffles: int = field(default=20, metadata={"help": "Shuffles for the control of the alignment."})
    seed: int = field(default=0, metadata={"help": "Seed of the permutations."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not in the model's folder."}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where the model runs."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Type of the weights; auto: as they are stored."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository to run."})

    def __post_init__(self):
        check_options(self, block_size=1, batch_size=1, excerpt_length=1)


def main(argv: list[str] | None = None) -> None:
    args, positional = parse_arguments(
        [AnalysisArguments],
        argv,
        command="gma-hf analyze",
        description=__doc__.splitlines()[0],
        positional=("model", "Folder or hub name of the model."),
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gma_hf").setLevel(logging.INFO)
    expect_one_process()
    run = RunFolder(args.output, fingerprint("analyze", [args], {"model": positional.model, "text": args.text}))
    if run.is_finished:
        return
    with run:
        texts = read_texts(args.text)
        model = load_model(positional.model, args.device, args.dtype, args.trust_remote_code)
        tokenizer = load_tokenizer(args.tokenizer_name or positional.model, args.trust_remote_code)
        report = analyze(
            model,
            tokenizer,
            texts.pieces(),
            max_tokens=args.max_tokens or None,
            block_size=args.block_size,
            batch_size=args.batch_size,
            excerpt_length=args.excerpt_length,
            num_shuffles=args.num_shuffles,
            seed=args.seed,
            text_name=texts.name,
        )
        names = [path.name for path in write_report(report, run.beside("report"), args.token)]
        run.put_in_place(run.beside("report"))
    for name in names:
        print(run.folder / name)
