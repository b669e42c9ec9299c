# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Measure a language model on texts, with confidence intervals, and write its card from the measurements.

    gma-hf card model_cards/gma-wikitext103 --model outputs/gma-wikitext103 \
        --evaluate "WikiText-103 test=test.txt" "WikiText-103 validation=valid.txt"

    gma-hf card model_cards/gma-gated-wikipedia-36m --model outputs/gma_gated-1024-64-0 \
        --benchmark benchmarks/results/language_modeling.json --row gma_gated:1024:64:0

CARD is a folder with `card.yaml` (what the model is for, its data, its limits) and `recipe.yaml` (arguments of the training
command). With --model, the command copies `config.json` and `results.json` from the folder of the model (or takes the results of
the benchmark that trained the model), and adds the measurements. It always writes `README.md` anew. `--help` lists the options.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..training.arguments import parse_arguments
from ..training.cards.published_card import expect_made_here, results_of_row, write_published_card
from ..training.errors import TrainingInputError
from ..training.files import write_json
from ..training.intervals import evaluate_text
from ..training.options import check_options
from .running import expect_one_process
from .shared.training import set_up_logging


@dataclass
class CardArguments:
    """The model, and the texts to measure it on."""

    model: str | None = field(
        default=None, metadata={"help": "Folder of the model. Default: measure nothing, write the card anew."}
    )
    evaluate: list[str] = field(
        default_factory=list, metadata={"help": "Texts to measure on, NAME=FILE each; FILE may be a pattern."}
    )
    benchmark: str | None = field(
        default=None,
        metadata={"help": "JSON file of the benchmark that trained the model, if no training script did."},
    )
    row: str | None = field(default=None, metadata={"help": "Its row of the model."})
    repo_id: str | None = field(default=None, metadata={"help": "Name on the hub, for the example that loads it."})
    block_size: int = field(default=1024, metadata={"help": "Tokens per window."})
    batch_size: int = field(default=8, metadata={"help": "Windows per forward pass."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where the model runs."}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 (autocast)."})

    def __post_init__(self):
        check_options(self, block_size=2, batch_size=1)


def measure(card: Path, args: CardArguments) -> None:
    """Write `results.json` and `config.json` into the folder of the card."""
    texts = {}
    for word in args.evaluate:
        name, equals, pattern = word.partition("=")
        if not (name and equals and pattern):
            raise TrainingInputError(f"--evaluate takes NAME=FILE, got {word!r}.")
        texts[name] = pattern
    folder = Path(args.model)
    if not (folder / "config.json").is_file():
        raise TrainingInputError(f"{folder} has no config.json. Give the folder that save_pretrained wrote.")
    results = {}
    if args.benchmark is not None:
        results = results_of_row(json.loads(Path(args.benchmark).read_text(encoding="utf-8")), args.row)
    elif (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder).to(args.device)
    results["num_parameters"] = model.num_parameters()
    evaluations = results.setdefault("evaluations", {})
    for name, pattern in texts.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            evaluations[name] = evaluate_text(model, tokenizer, [pattern], args.block_size, args.batch_size)
        logging.getLogger("gma_hf").info("%s: %s", name, evaluations[name])
    keep_evaluations(card / "results.json", results)
    write_json(card / "results.json", results)
    shutil.copyfile(folder / "config.json", card / "config.json")


def keep_evaluations(path: Path, results: dict[str, Any]) -> None:
    """
    Add the measurements of an earlier call on the same model to new results.

    Raises:
        TrainingInputError: if the file has results of another model, which would be lost.
    """
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in ("date", "command", "num_parameters"):
        if before.get(name) != results.get(name):
            raise TrainingInputError(
                f"{path} holds results of another model: its {name} is {before.get(name)!r}, and that of --model "
                f"{results.get(name)!r}. Take another folder for the card, or move the file away."
            )
    results["evaluations"] = {**before.get("evaluations", {}), **results["evaluations"]}


def main(argv: list[str] | None = None) -> None:
    args, positional = parse_arguments(
        [CardArguments],
        argv,
        command="gma-hf card",
        description=__doc__.splitlines()[0],
        positional=("card", "Folder of the card."),
    )
    set_up_logging()
    expect_one_process()
    card = Path(positional.card)
    if not card.is_dir():
        raise TrainingInputError(f"There is no folder {card}. It holds card.yaml and recipe.yaml.")
    if args.evaluate and args.model is None:
        raise TrainingInputError("--evaluate needs --model, the model that is measured.")
    if (args.benchmark is None) != (args.row is None):
        raise TrainingInputError("--benchmark and --row belong together: a file, and the row of the model in it.")
    expect_made_here(card / "README.md")
    if args.model is not None:
        measure(card, args)
    print(write_published_card(card, args.repo_id))
