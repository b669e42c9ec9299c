#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
SmolLM2-135M-Instruct converted to GMA and distilled on Wikipedia and books, without any language-model loss.

    python benchmarks/conversion/smollm2.py --model smollm2 --data DATA --prepare smollm2.pt
    python benchmarks/conversion/smollm2.py --model smollm2 --prepared smollm2.pt --minutes 6 --rows window

`--prepare` tokenizes: Wikipedia and books to train on, in blocks of 4,096 tokens, the test set of WikiText-103 to measure and
its validation set to choose rates and weights by. DATA holds `wikipedia-long`, `books` and `wikitext-103`. Perplexity is that
of the whole test set in windows of 1,024 tokens that do not overlap, KL that to the original's distributions at every
position; perplexity by position is that in windows of 8,192, twice as long as the blocks of the training. Rows that the output
file holds already are not repeated; `finetune` goes on from the model of the row `window`, which `--work` keeps.
"""

import argparse
import json
import math
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.conversion.stages import convert_and_distil, train_stage
from benchmarks.lib.command import command
from benchmarks.lib.results import Results, device
from benchmarks.lib.tables import markdown
from benchmarks.quality.tasks import corpora
from gma_hf import gma_layers
from gma_hf.commands.shared.conversion import sample_texts
from gma_hf.conversion.calibration.sensitivity import choose_layers, rank_layers
from gma_hf.conversion.distillation.losses import kl_divergence
from gma_hf.conversion.distillation.trainer import GMADistillationTrainer
from gma_hf.training import GMATrainer


LENGTH = 1024  # of the windows of the test
TRAIN_LENGTH = 4096
LONG = 8192  # of the windows of the curve of perplexity by position
BUCKET = 1024
TRAIN_TOKENS = 16_000_000
EVAL_BATCH_SIZE = 16  # windows of the test
WINDOW = 128  # tokens that are seen exactly, besides the first one
CALIBRATION_TOKENS = 131_072
FINETUNE_RATE = 5e-5
PROMPTS = [
    "The history of the city begins",
    "Scientists have discovered that",
    "Once upon a time, in a village by the sea,",
]
# Whether layers have a window, how many of them stay softmax, and whether mixtures are calibrated
CONVERSIONS = {
    "window": (True, 0, True),
    "keep": (True, 7, True),
    "no_window": (False, 0, True),
    "window_random": (True, 0, False),
}
TITLES = {
    "original": "original, softmax",
    "keep": "7 of 30 layers stay softmax, the others window + GMA",
    "window": "all layers, window + GMA",
    "window_random": "the same, mixtures not calibrated",
    "no_window": "all layers, GMA with forgetting, no softmax",
    "finetune": "all layers, window + GMA, then fine-tuned",
    "finetune_original": "original, fine-tuned in the same way",
}
SUMMARY = {
    "keep": "7 of 30 layers stay softmax, the others GMA behind a window of 128 tokens and one sink token",
    "window": "all layers GMA behind a window of 128 tokens and one sink token",
    "no_window": "all layers GMA with forgetting, no softmax at all",
}
TRANSFER_SHARE = 0.2  # of the time


def prepare(arguments: argparse.Namespace) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def tokens_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    half = arguments.tokens // 2
    parts = []
    for name in ("wikipedia-long", "books"):
        found = []
        for text in corpora.texts_of(arguments.data / name / "train.jsonl.xz"):
            # Not the whole of every book: many authors matter more than long runs of one
            found += [separator, *tokens_of(text[:400_000])]
            if len(found) >= half:
                break
        parts.append(torch.tensor(found[: half // TRAIN_LENGTH * TRAIN_LENGTH], dtype=torch.int32))
    blocks = torch.cat(parts).view(-1, TRAIN_LENGTH)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    splits = {"train": blocks}
    for name in ("valid", "test"):
        text = corpora.text_of(arguments.data / "wikitext-103" / f"{name}.txt.xz")
        splits[name] = torch.tensor(tokens_of(text), dtype=torch.int32)
    # Every number below 2^16: half the size of int32
    prepared = {name: x.to(torch.uint16) for name, x in splits.items()}
    corpora.save(prepared, arguments.prepare)
    return {name: tuple(x.shape) for name, x in prepared.items()}


def load_original(arguments: argparse.Namespace):
    return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(device()).eval()


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
        return model(tokens, use_cache=False).logits


@torch.no_grad()
def measure(model, teacher, test: torch.Tensor, count: int | None) -> dict:
    """Perplexity and KL to the original per token, over the test set, or `count` of its windows of 1,024."""
    model.eval()
    nll = divergence = torch.zeros((), device=device())
    predicted = positions = 0
    *full, last = test.split(LENGTH)
    batches = list(torch.stack(full[:count]).split(EVAL_BATCH_SIZE))
    if count is None and len(last) > 1:
        batches.append(last[None])
    for batch in batches:
        tokens = batch.long().to(device())
        logits = logits_of(model, tokens)
        target = logits if teacher is None else logits_of(teacher, tokens)
        for row, target_row, labels in zip(logits, target, tokens, strict=True):
            nll = nll + F.cross_entropy(row[:-1].float(), labels[1:], reduction="sum")
            if teacher is not None:
                divergence = divergence + kl_divergence(row, target_row, torch.ones(len(row), device=device()))
        predicted, positions = predicted + tokens[:, 1:].numel(), positions + tokens.numel()
    scores = {"perplexity": round(math.exp(nll.item() / predicted), 3), "num_tokens": predicted}
    return scores if teacher is None else {**scores, "kl": round(divergence.item() / positions, 4)}


@torch.no_grad()
def perplexity_by_position(model, test: torch.Tensor, count: int | None) -> dict[str, float]:
    """Perplexity over windows of 8,192 tokens, for every 1,024 positions."""
    model.eval()
    windows = test[: len(test) // LONG * LONG].view(-1, LONG)
    windows = windows if count is None else windows[: max(1, count * LENGTH // LONG)]
    total = torch.zeros(LONG - 1, dtype=torch.float64)
    for tokens in windows.split(EVAL_BATCH_SIZE * LENGTH // LONG):
        tokens = tokens.long().to(device())
        for row, labels in zip(logits_of(model, tokens), tokens, strict=True):
            total += F.cross_entropy(row[:-1].float(), labels[1:], reduction="none").double().cpu()
    means = (total / len(windows)).split(BUCKET)
    return {f"{BUCKET * i}-{BUCKET * (i + 1)}": round(mean.mean().exp().item(), 2) for i, mean in enumerate(means)}


def describe(model, teacher, prepared: dict, arguments: argparse.Namespace) -> dict:
    """Everything that is measured of a finished model."""
    tokenizer, count = AutoTokenizer.from_pretrained(arguments.model), arguments.test_windows
    return {
        **measure(model, teacher, prepared["test"], count),
        "validation": measure(model, teacher, prepared["valid"], count),
        "by_position": perplexity_by_position(model, prepared["test"], count),
        "samples": sample_texts(model, tokenizer, PROMPTS, 60),
    }


def training_data(prepared: dict, with_labels: bool = False) -> dict:
    """What a trainer reads: all blocks, and how they become a batch."""
    names = ("input_ids", "labels") if with_labels else ("input_ids",)
    return {
        "train_dataset": [dict.fromkeys(names, row) for row in prepared["train"]],
        "data_collator": lambda rows: {name: torch.stack([row[name] for row in rows]).long() for name in names},
    }


def converted(name: str, arguments: argparse.Namespace, prepared: dict) -> dict:
    """A row: the model converted and distilled."""
    has_window, keep, is_calibrated = CONVERSIONS[name]
    options = {"window_size": WINDOW, "num_sink_tokens": 1} if has_window else {"use_forgetting": True}
    options |= {"num_components": 64, "use_routing_projections": True}
    options["undo_rotation_beyond"] = arguments.undo_rotation_beyond
    torch.manual_seed(0)
    reference, model = load_original(arguments), load_original(arguments)
    row: dict = {"title": TITLES[name], "options": options, "scores": {}}
    calibration = {"max_tokens": CALIBRATION_TOKENS, "evaluation_tokens": 2 * TRAIN_LENGTH}

    def score(state: str, scores: dict | None = None) -> None:
        row["scores"][state] = scores or measure(model, reference, prepared["test"], arguments.test_windows)
        print(state, json.dumps(row["scores"][state]), flush=True)

    def batches(count: int | None = None):
        pairs = prepared["train"].split(2)[:count]
        return (pair.long().to(device()) for pair in pairs)

    layers = None
    if keep:
        limits = {"max_tokens": 2 * TRAIN_LENGTH, "calibration_options": {**calibration, "progress": False}}
        some = list(batches(CALIBRATION_TOKENS // TRAIN_LENGTH // 2))
        ranking = rank_layers(model, some, progress=False, **limits, **options)
        layers = choose_layers(ranking, keep)
        row["ranking"] = [layer._asdict() for layer in ranking]
    # A teacher only tells; half the bytes are enough on a GPU
    teacher = load_original(arguments).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    row |= convert_and_distil(
        model, {**training_data(prepared), "teacher": teacher}, score, options, layers,
        batches=batches() if is_calibrated else None, calibration=calibration, minutes=arguments.minutes,
        batch_size=arguments.batch_size, transfer_share=TRANSFER_SHARE, transfer_rate=arguments.transfer_rate,
        rate=arguments.rate,
        arguments={"gma_learning_rate": arguments.gma_rate, "hidden_weight": arguments.hidden_weight},
    )  # fmt: skip
    row["converted_layers"] = len(gma_layers(model))
    row["tokens"] = sum(stage["steps"] for stage in row["stages"]) * arguments.batch_size * TRAIN_LENGTH
    score("after distillation", describe(model, reference, prepared, arguments))
    if name == "window" and arguments.work is not None:
        model.save_pretrained(arguments.work / "window")
    return row


def fine_tuned(name: str, arguments: argparse.Namespace, prepared: dict) -> dict:
    """Stage 3, the usual loss on the same text; of the unconverted model by the same optimizer."""
    torch.manual_seed(1)
    is_converted = name == "finetune"
    folder = arguments.work / "window" if is_converted else arguments.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device())
    data = training_data(prepared, with_labels=True)
    data["trainer_class"] = GMADistillationTrainer if is_converted else GMATrainer
    stage = train_stage(model, "finetune", arguments.finetune_minutes, arguments.batch_size, FINETUNE_RATE, **data)
    scores = describe(model, load_original(arguments), prepared, arguments)
    return {"title": TITLES[name], "stages": [stage], "scores": {"after fine-tuning": scores}}


def run(arguments: argparse.Namespace) -> None:
    """Measure the rows that the output file does not hold yet."""
    if "finetune" in arguments.rows and arguments.work is None:
        sys.exit("error: the row 'finetune' needs --work, where the row 'window' keeps its model")
    prepared = {name: x.to(torch.int32) for name, x in corpora.load(arguments.prepared).items()}
    setting = {"length": LENGTH, "train_length": TRAIN_LENGTH, "test_windows": arguments.test_windows}
    results = Results(arguments.output, "conversion.smollm2", setting)

    def measured(name: str) -> dict:
        if name == "original":
            scores = describe(load_original(arguments), None, prepared, arguments)
            return {"title": TITLES[name], "scores": {"original": scores}}
        return (converted if name in CONVERSIONS else fine_tuned)(name, arguments, prepared)

    for name in arguments.rows:
        results.measure(name, measured, name)


def table(content: dict) -> str:
    """Perplexity and KL of every state of every model, what is to be known, and perplexity along long windows."""
    rows = content["rows"]
    original = rows.get("original", {}).get("scores", {}).get("original", {}).get("perplexity")
    lines, notes, along = [], {}, {}
    for row in rows.values():
        for state, scores in row["scores"].items():
            ratio = "" if original is None else f"{scores['perplexity'] / original:.3f}"
            kl = f"{scores['kl']:.4f}" if "kl" in scores else ""
            lines.append([f"{row['title']}: {state}", f"{scores['perplexity']:.2f}", ratio, kl])
        if "note" in row:
            notes.setdefault(row["note"], []).append(row["title"])
        if "by_position" in scores:
            along[row["title"]] = scores["by_position"]
    parts = [markdown(["model", "perplexity", "of the original's", "KL per token (nats)"], lines)]
    parts.append("\n".join(f"- {note} This holds for: *{'*; *'.join(titles)}*." for note, titles in notes.items()))
    if along:
        columns = list(next(iter(along.values())))
        parts.append("Perplexity by position, in windows of the whole length:")
        parts.append(markdown(["model", *columns], [[k, *(f"{x[c]:.1f}" for c in columns)] for k, x in along.items()]))
    return "\n\n".join(filter(None, parts))


def summary(content: dict) -> str:
    """The original and the models of the three recipes after distillation, as the README shows them."""
    rows = content["rows"]
    original = rows["original"]["scores"]["original"]["perplexity"]
    lines = [["original", "", f"{original:.1f}", ""]]
    for name, title in SUMMARY.items():
        perplexity = rows[name]["scores"]["after distillation"]["perplexity"]
        minutes = sum(stage["seconds"] for stage in rows[name]["stages"]) / 60
        lines.append([title, f"{round(2 * minutes) / 2:g}", f"{perplexity:.1f}", f"{perplexity / original:.2f}"])
    return markdown(["", "minutes", "perplexity", "of the original's"], lines)


def add_options(add) -> None:
    add("--model", type=Path, help="folder of the original")
    add("--tokens", type=int, default=TRAIN_TOKENS, help="tokens to train on, for --prepare")
    add("--rows", nargs="+", choices=list(TITLES), default=list(TITLES))
    add("--minutes", type=float, default=4.0, help="of training per conversion")
    add("--finetune_minutes", type=float, default=1.5, help="of each fine-tuning")
    add("--batch_size", type=int, default=4, help="blocks of 4,096 tokens")
    add("--undo_rotation_beyond", type=float, help="as `convert_to_gma` takes it")
    add("--transfer_rate", type=float, default=5e-3, help="learning rate of attention transfer")
    add("--rate", type=float, default=2e-4, help="learning rate of the old weights in distillation")
    add("--gma_rate", type=float, default=1e-3, help="learning rate of the new weights in distillation")
    add("--hidden_weight", type=float, default=0.0, help="of the hidden states' distance, beside the KL")
    add("--test_windows", type=int, help="measure on so many windows only, to try things out")
    add("--work", type=Path, help="folder that keeps the model of the row 'window' for 'finetune'")


def main() -> None:
    command(__doc__, "conversion_smollm2", add_options, run, table, needs=("model", "prepared"), prepare=prepare)


if __name__ == "__main__":
    main()
