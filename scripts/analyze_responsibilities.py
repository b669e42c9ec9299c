#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Analyse how the Gaussian mixtures of a model route the tokens of a text: report.html to read, report.json to compute.

    python scripts/analyze_responsibilities.py outputs/demo --text book.txt --output analysis

MODEL is a folder or hub name of a GMA model or of a model that was converted to GMA; `--help` lists the options.
"""

import logging
import sys
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import HfArgumentParser

import gma_hf  # noqa: F401 (registers the models with the Auto classes)
from gma_hf.analysis import AnalysisError, analyze, write_report
from gma_hf.analysis.loading import load_model, load_tokenizer, read_texts


@dataclass
class AnalysisArguments:
    """What is read, and how closely."""

    text: list[str] = field(
        metadata={"help": "UTF-8 text files, plain or with .gz or .xz, read one after the other.", "required": True}
    )
    output: str = field(default="analysis", metadata={"help": "Folder for report.html and report.json."})
    max_tokens: int = field(default=100_000, metadata={"help": "Read no further than so many tokens; 0: everything."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per forward pass. Default: 512, or what the model can take."}
    )
    batch_size: int = field(default=8, metadata={"help": "Blocks per forward pass."})
    excerpt_length: int = field(
        default=32, metadata={"help": "Tokens at the beginning that are looked at one by one."}
    )
    token: int | None = field(
        default=None,
        metadata={"help": "The token of the excerpt whose route is drawn, from 0. Default: the last word."},
    )
    num_shuffles: int = field(default=20, metadata={"help": "Permutations of the control of the alignment."})
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


def main():
    parser = HfArgumentParser([AnalysisArguments], description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="Folder or hub name of the model.")
    args, positional = parser.parse_args_into_dataclasses(look_for_args_file=False)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gma_hf").setLevel(logging.INFO)

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
    for path in write_report(report, args.output, args.token):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except AnalysisError as error:
        sys.exit(f"error: {error}")
