#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Recall: where a state of constant size loses against softmax attention, and how many softmax layers win it back.

    python benchmarks/quality/recall.py --experiments recall --per_gpu 8
    python benchmarks/quality/recall.py --table --plot

- `recall`: multi-query associative recall (Zoology, Arora et al., 2024). Trained on a mix of 4 to 64 pairs in 64 to 256 tokens,
  tested on up to 256 pairs in 1,024 tokens: more and longer than in training.
- `needle`: one fact of several, hidden at some depth in random tokens. Trained on `--train_lengths` with a fact in
  every eight tokens, so that there is much to learn from; tested with `--facts`, also beyond these lengths.

The tasks are in tasks/recall.py. A contender is written mixer:layers:softmax layers:components, all but the mixer optional:
`gma_gated:4:1,3` is a model of four gated GMA layers of which the second and the last are softmax attention instead, `gma_gated:2::256`
has 256 components. Models of the same depth have as many parameters as Mamba-2, within 3% (`needle`: without the table of learned
positions, which is as long as the longest test). Rows that the output file holds already are not measured again. Every contender
is trained with each of the `--rates` and `--seeds`; the tables show the best rate of each, as Zoology does, the mean over the
seeds and the worst of them.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lib.command import command
from benchmarks.lib.results import Results, device
from benchmarks.lib.runner import Row, add_run_options, run_rows
from benchmarks.lib.training import compile_blocks, evaluating, train
from benchmarks.quality.recall_report import plot, tables
from benchmarks.quality.tasks.recall import (
    IGNORE_INDEX,
    NEEDLE_VOCAB_SIZE,
    RECALL_VOCAB_SIZE,
    Stream,
    draw_needle,
    draw_recall,
    multi_query_recall,
    needle,
)
from benchmarks.rivals import mixers
from benchmarks.rivals.mixers import MIXERS, make_config, make_model
from gma_hf.training.trainer import GMATrainer


REFERENCE = "mamba2"  # the one whose size cannot be chosen
DEFAULT_CONTENDERS = {
    # The same state, 64 x 64 a head or a normaliser more: all but softmax and Mamba-2. In the second line larger states
    "recall": "softmax:2 softmax_gated:2 elu:2 linear_gated:2 step_gated:2 gated_delta_net:2 gma_paper:2 gma_gated:2 "
    "gma_correlated:2 mamba2:2 gma_gated:2::256 gma_gated:4:2 gma_gated:4:1,3",
    "needle": "softmax:2 softmax_gated:2 linear_gated:2 mamba2:2 gma_gated:2 gma_gated:4:2",
}
# (length, pairs), those of Zoology in its proportions: five batches of the easiest for one of each other. Without that surplus
# softmax attention has not left the plateau of guessing among the values of the text after as many steps.
TRAIN_SEGMENTS = 5 * [(64, 4)] + [(128, 8), (256, 16), (256, 32), (256, 64)]
TEST_SEGMENTS = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
# Of the needle; as often as it is listed. Attention learns first on the shortest, on which it is spread least
NEEDLE_TRAIN_LENGTHS = 3 * [64] + [128, 256, 512, 1024]
TOKENS_PER_EVALUATION = 65536


@dataclass(frozen=True)
class Contender:
    """A model to compare: see the text above."""

    mixer: str
    layers: int
    softmax_layers: tuple[int, ...]
    components: int

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """From mixer:layers:softmax layers:components; a ValueError for anything else."""
        found = re.fullmatch(r"(\w+)(?::(\d*))?(?::([\d,]*))?(?::(\d*))?", text)
        if found is None or found[1] not in MIXERS:
            raise ValueError(
                f"{text!r} is no contender: write mixer:layers:softmax layers:components, the mixer one of {list(MIXERS)}."
            )
        chosen = tuple(int(index) for index in (found[3] or "").split(",") if index)
        contender = cls(found[1], int(found[2] or 2), chosen, int(found[4] or 64))
        if chosen and (found[1] != "gma_gated" or not set(chosen) <= set(range(contender.layers))):
            raise ValueError(
                f"{text!r} is no contender: layers 0 to {contender.layers - 1} of a gma_gated model can be softmax."
            )
        return contender

    def __str__(self) -> str:
        return f"{self.mixer}:{self.layers}:{','.join(map(str, self.softmax_layers))}:{self.components}"

    @property
    def title(self) -> str:
        mixer = MIXERS[self.mixer]
        # Mixers may take two layers for one of the others
        name, layers = mixer.name, f"{mixer.layer_factor * self.layers} layers"
        if self.mixer.startswith("gma") and self.components != 64:
            name += f", {self.components} components"
        if self.softmax_layers:
            return f"hybrid: {name}, {len(self.softmax_layers)} softmax of {layers}"
        return f"{name}, {layers}"

    def overrides(self) -> dict:
        if not self.softmax_layers:
            return {}
        kinds = {True: "full_attention", False: "linear_attention"}
        return {"layer_types": [kinds[index in self.softmax_layers] for index in range(self.layers)]}


class RecallTrainer(GMATrainer):
    """The loss of the labelled positions alone: the head, which is most of such a model, does not see the others."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():
            logits, labels = answers(model, inputs["input_ids"], inputs["labels"])
            loss = F.cross_entropy(logits.float(), labels)
        return (loss, {"logits": logits}) if return_outputs else loss


def answers(model, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a model predicts for the labelled positions, `[positions, vocab_size]`, and their labels."""
    labels = labels[:, 1:]
    is_asked = labels != IGNORE_INDEX
    hidden_states = model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden_states[is_asked]), labels[is_asked]


def recalled(model, tokens: Tensor, labels: Tensor) -> float:
    """The share of the labelled positions that are predicted right."""
    correct = torch.zeros((), dtype=torch.long, device=device())
    rows = max(1, TOKENS_PER_EVALUATION // tokens.shape[1])
    with evaluating(model):
        for part, expected in zip(tokens.split(rows), labels.split(rows), strict=True):
            logits, expected = answers(model, part.to(device()), expected.to(device()))
            correct += (logits.argmax(dim=-1) == expected).sum()
    return correct.item() / int((labels != IGNORE_INDEX).sum())


def train_one(
    contender: Contender, recipe: dict, seed: int, vocab_size: int, max_length: int, data: Stream, score: Callable
):
    """Train one model; the row without its test."""
    width = recipe["width"]
    shared = {
        "hidden_size": width, "num_attention_heads": max(1, width // 64), "num_hidden_layers": contender.layers,
        "num_components": contender.components, "vocab_size": vocab_size, "max_position_embeddings": max_length,
    }  # fmt: skip
    sizes = {**shared, **contender.overrides()}
    counted = {} if recipe["experiment"] == "recall" else {"max_position_embeddings": 1}
    own, reference = {**sizes, **counted}, {**shared, **counted}
    sizes["intermediate_size"] = mixers.equal_width(contender.mixer, own, REFERENCE, reference, multiples=(8,))
    torch.manual_seed(seed)
    config = make_config(contender.mixer, **sizes)
    model = make_model(contender.mixer, config)
    if recipe["compile"]:
        compile_blocks(model, dynamic=True)  # batches differ in length
    row = train(
        model, data, lambda batches: batches[0], {**recipe, "batch_size": 1}, seed, score=lambda: score(model),
        trainer_class=RecallTrainer, dataloader_num_workers=recipe["workers"],
        accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    state = mixers.state_per_layer(contender.mixer, config)
    description = {
        "recipe": recipe, "contender": str(contender), "title": contender.title, "state_per_layer": state, "seed": seed,
        "state_size": None if state is None else state * contender.layers, **mixers.program_of(contender.mixer),
        "intermediate_size": sizes["intermediate_size"],
    }  # fmt: skip
    return model, {**description, **row}


def run_recall(contender: Contender, recipe: dict, seed: int, test_rows: int) -> dict:
    """Multi-query associative recall: the accuracy in every test segment."""
    generator = torch.Generator().manual_seed(987654321)  # the same tests for all
    vocab_size = recipe["vocab_size"]
    tests = {segment: multi_query_recall(test_rows, *segment, generator, vocab_size) for segment in TEST_SEGMENTS}
    hardest = [part[: max(1, test_rows // 8)] for part in tests[TRAIN_SEGMENTS[-1]]]
    tokens = recipe["tokens_per_step"]
    draw = partial(draw_recall, segments=TRAIN_SEGMENTS, tokens_per_batch=tokens, vocab_size=vocab_size)
    longest = max(length for length, _ in TEST_SEGMENTS)
    data = Stream(draw, seed)
    model, row = train_one(contender, recipe, seed, vocab_size, longest, data, lambda model: recalled(model, *hardest))
    accuracy = [[length, pairs, round(recalled(model, *test), 4)] for (length, pairs), test in tests.items()]
    return {**row, "accuracy": accuracy}


def run_needle(contender: Contender, recipe: dict, seed: int, test_rows: int) -> dict:
    """Needle in a haystack: the accuracy by length and depth."""
    train_lengths, lengths = recipe["train_lengths"], recipe["lengths"]
    draw = partial(draw_needle, lengths=train_lengths, tokens_per_batch=recipe["tokens_per_step"])

    def test(model, length: int, depth: float) -> float:
        generator = torch.Generator().manual_seed(length)
        return recalled(model, *needle(test_rows, length, generator, recipe["facts"], depth))

    longest, data = max(*lengths, *train_lengths), Stream(draw, seed)
    score = partial(test, length=max(train_lengths), depth=0.0)
    model, row = train_one(contender, recipe, seed, NEEDLE_VOCAB_SIZE, longest, data, score)
    depths = [round(i / (recipe["depths"] - 1), 4) for i in range(recipe["depths"])]
    accuracy = [[length, depth, round(test(model, length, depth), 4)] for length in lengths for depth in depths]
    return {**row, "accuracy": accuracy}


RUNS = {"recall": run_recall, "needle": run_needle}


def wanted_rows(arguments: argparse.Namespace) -> dict[str, Row]:
    """By name, what trains and tests a row."""
    rows = {}
    for experiment in arguments.experiments:
        contenders = arguments.contenders or [Contender.parse(text) for text in DEFAULT_CONTENDERS[experiment].split()]
        names = ("steps", "tokens_per_step", "compile", "workers")
        names += ("vocab_size",) if experiment == "recall" else ("lengths", "train_lengths", "facts", "depths")
        shared = {"experiment": experiment, **{name: getattr(arguments, name) for name in names}, "weight_decay": 0.1}
        test_rows = arguments.test_rows if experiment == "recall" else max(1, arguments.test_rows // 8)
        wanted = itertools.product(arguments.seeds, arguments.widths, arguments.rates, contenders)
        for seed, width, rate, contender in wanted:
            recipe = {**shared, "width": width, "learning_rate": rate}
            name = f"{experiment}, {contender}, width {width}, learning rate {rate:g}, seed {seed}"
            rows[name] = Row(partial(RUNS[experiment], contender, recipe, seed, test_rows), recipe)
    return rows


def add_options(add) -> None:
    add("--experiments", nargs="+", choices=list(RUNS), default=list(RUNS))
    add("--contenders", nargs="+", type=Contender.parse, metavar="CONTENDER")
    add("--steps", type=int, default=3000)
    add("--widths", type=int, nargs="+", default=[128], help="hidden sizes")
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3], help="learning rates of each")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--vocab_size", type=int, default=RECALL_VOCAB_SIZE, help="of recall; more than 512")
    add("--tokens_per_step", type=int, default=16384)
    add("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192], help="of needle")
    add("--train_lengths", type=int, nargs="+", default=NEEDLE_TRAIN_LENGTHS, help="of needle")
    add("--facts", type=int, default=4, help="in the haystack")
    add("--depths", type=int, default=11, help="of the needle, from the beginning to the end")
    add("--test_rows", type=int, default=512, help="per segment; needle: an eighth of it per depth")
    add("--workers", type=int, default=1, help="processes that draw batches")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="the blocks")
    add_run_options(add)


def main() -> None:
    def run(options: argparse.Namespace) -> None:
        run_rows(Results(options.output, "recall", {}), wanted_rows(options), options)

    command(__doc__, "recall", add_options, run, lambda x: tables(x["rows"]), lambda x: plot(x["rows"]))


if __name__ == "__main__":
    main()
