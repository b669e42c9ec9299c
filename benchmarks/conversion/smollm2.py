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
import itertools
import json
import math
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lib import corpora
from benchmarks.lib.command import command
from benchmarks.lib.results import Results, device
from benchmarks.lib.tables import markdown
from benchmarks.lib.timed import train_stage
from gma_hf import convert_to_gma, gma_layers
from gma_hf.commands.shared.conversion import sample_texts
from gma_hf.conversion.calibration.calibrate import calibrate
from gma_hf.conversion.calibration.sensitivity import choose_layers, rank_layers
from gma_hf.conversion.distillation.losses import kl_divergence
from gma_hf.conversion.distillation.trainer import GMADistillationTrainer
from gma_hf.training import GMATrainer


LENGTH = 1024  # of the windows of the test
TRAIN_LENGTH = 4096
LONG = 8192  # of the windows of the curve of perplexity by position
BUCKET = 1024
TRAIN_TOKENS = 16_000_000
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


def autocast():
    return torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available())


@torch.no_grad()
def measure(model, teacher, test: torch.Tensor, arguments: argparse.Namespace) -> dict:
    """Perplexity and KL to the original per token, over the test set in windows of 1,024."""
    model.eval()
    nll = divergence = torch.zeros((), device=device())
    predicted = positions = 0
    windows = list(test.split(LENGTH))
    full = torch.stack([window for window in windows if len(window) == LENGTH])[: arguments.test_windows]
    batches = list(full.split(arguments.eval_batch_size))
    if arguments.test_windows is None and 1 < len(windows[-1]) < LENGTH:
        batches.append(windows[-1][None])
    for batch in batches:
        tokens = batch.long().to(device())
        with autocast():
            logits = model(tokens, use_cache=False).logits
            target = logits if teacher is None else teacher(tokens, use_cache=False).logits
        for row, target_row, labels in zip(logits, target, tokens, strict=True):
            nll = nll + F.cross_entropy(row[:-1].float(), labels[1:], reduction="sum")
            if teacher is not None:
                divergence = divergence + kl_divergence(row, target_row, torch.ones(len(row), device=device()))
        predicted, positions = predicted + tokens[:, 1:].numel(), positions + tokens.numel()
    scores = {"perplexity": round(math.exp(nll.item() / predicted), 3), "num_tokens": predicted}
    if teacher is not None:
        scores["kl"] = round(divergence.item() / positions, 4)
    return scores


@torch.no_grad()
def perplexity_by_position(model, test: torch.Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Perplexity over windows of 8,192 tokens, for every 1,024 positions."""
    model.eval()
    windows = test[: len(test) // LONG * LONG].view(-1, LONG)
    windows = windows if arguments.test_windows is None else windows[: max(1, arguments.test_windows // 8)]
    total = torch.zeros(LONG - 1, dtype=torch.float64)
    for batch in windows.split(max(1, arguments.eval_batch_size // 8)):
        tokens = batch.long().to(device())
        with autocast():
            logits = model(tokens, use_cache=False).logits
        for row, labels in zip(logits, tokens, strict=True):
            total += F.cross_entropy(row[:-1].float(), labels[1:], reduction="none").double().cpu()
    means = (total / len(windows)).split(BUCKET)
    return {f"{BUCKET * i}-{BUCKET * (i + 1)}": round(mean.mean().exp().item(), 2) for i, mean in enumerate(means)}


def describe(model, teacher, prepared: dict, arguments: argparse.Namespace) -> dict:
    """Everything that is measured of a finished model."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    return {
        **measure(model, teacher, prepared["test"], arguments),
        "validation": measure(model, teacher, prepared["valid"], arguments),
        "by_position": perplexity_by_position(model, prepared["test"], arguments),
        "samples": sample_texts(model, tokenizer, PROMPTS, 60),
    }


def training_batches(prepared: dict, size: int, start: int = 0):
    return (block.long().to(device()) for block in prepared["train"][start:].to(torch.int32).split(size))


def blocks_of(prepared: dict, with_labels: bool = False) -> list[dict]:
    rows = prepared["train"].to(torch.int32)
    return [{"input_ids": row, "labels": row} if with_labels else {"input_ids": row} for row in rows]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]).long() for name in rows[0]}


def converted(name: str, arguments: argparse.Namespace, prepared: dict) -> dict:
    has_window, keep, is_calibrated = CONVERSIONS[name]
    near = {"window_size": arguments.window, "num_sink_tokens": arguments.sinks}
    options = near if has_window else {"use_forgetting": True}
    options = {**options, "num_components": arguments.components, "use_routing_projections": True}
    options["undo_rotation_beyond"] = arguments.undo_rotation_beyond
    torch.manual_seed(0)
    reference, model = load_original(arguments), load_original(arguments)
    row: dict = {"title": TITLES[name], "options": options, "stages": [], "scores": {}}
    calibration = {
        "max_tokens": arguments.calibration_tokens,
        "evaluation_tokens": 2 * TRAIN_LENGTH,
        "progress": False,
    }

    def score(state: str, scores: dict) -> None:
        row["scores"][state] = scores
        print(state, json.dumps(scores), flush=True)

    layers = None
    if keep:
        count = max(1, arguments.calibration_tokens // TRAIN_LENGTH // 2)
        batches = list(itertools.islice(training_batches(prepared, 2), count))
        limits = {"max_tokens": 2 * TRAIN_LENGTH, "calibration_options": calibration, "progress": False}
        ranking = rank_layers(model, batches, **limits, **options)
        layers = choose_layers(ranking, keep)
        row["ranking"] = [layer._asdict() for layer in ranking]
    convert_to_gma(model, layers, **options)
    row["converted_layers"] = len(gma_layers(model))
    score("converted, random mixtures", measure(model, reference, prepared["test"], arguments))
    if is_calibrated:
        report = calibrate(model, training_batches(prepared, 2), **calibration)
        row["calibration"] = report.to_dict()
        score("calibrated", measure(model, reference, prepared["test"], arguments))

    # A teacher only tells; half the bytes are enough on a GPU
    teacher = load_original(arguments)
    if torch.cuda.is_available():
        teacher.to(torch.bfloat16)
    data = {"train_dataset": blocks_of(prepared), "data_collator": collate, "teacher": teacher}
    minutes, size = arguments.minutes, arguments.batch_size
    transfer_minutes = TRANSFER_SHARE * minutes
    row["stages"].append(
        train_stage(model, "attention_transfer", transfer_minutes, size, arguments.transfer_rate, **data)
    )
    score("after attention transfer", measure(model, reference, prepared["test"], arguments))
    data["arguments"] = {"gma_learning_rate": arguments.gma_rate, "hidden_weight": arguments.hidden_weight}
    row["stages"].append(train_stage(model, "distillation", minutes - transfer_minutes, size, arguments.rate, **data))
    row["tokens"] = sum(stage["steps"] for stage in row["stages"]) * size * TRAIN_LENGTH
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
    data = {"train_dataset": blocks_of(prepared, with_labels=True), "data_collator": collate}
    trainer_class = GMADistillationTrainer if is_converted else GMATrainer
    minutes, size, rate = arguments.finetune_minutes, arguments.batch_size, arguments.finetune_rate
    stage = train_stage(model, "finetune", minutes, size, rate, trainer_class=trainer_class, **data)
    scores = describe(model, load_original(arguments), prepared, arguments)
    return {"title": TITLES[name], "stages": [stage], "scores": {"after fine-tuning": scores}}


def run(arguments: argparse.Namespace) -> None:
    """Measure the rows that the output file does not hold yet."""
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


def add_options(add) -> None:
    add("--model", type=Path, help="folder of the original")
    add("--tokens", type=int, default=TRAIN_TOKENS, help="tokens to train on, for --prepare")
    add("--rows", nargs="+", choices=list(TITLES), default=list(TITLES))
    add("--minutes", type=float, default=4.0, help="of training per conversion")
    add("--finetune_minutes", type=float, default=1.5, help="of each fine-tuning")
    add("--batch_size", type=int, default=4, help="blocks of 4,096 tokens")
    add("--eval_batch_size", type=int, default=16)
    add("--window", type=int, default=128, help="tokens that are seen exactly")
    add("--sinks", type=int, default=1, help="tokens of the beginning that are seen exactly")
    add("--components", type=int, default=64)
    add("--undo_rotation_beyond", type=float, help="as `convert_to_gma` takes it")
    add("--calibration_tokens", type=int, default=131_072)
    add("--transfer_rate", type=float, default=5e-3, help="learning rate of attention transfer")
    add("--rate", type=float, default=2e-4, help="learning rate of the old weights in distillation")
    add("--gma_rate", type=float, default=1e-3, help="learning rate of the new weights in distillation")
    add("--hidden_weight", type=float, default=0.0, help="of the hidden states' distance, beside the KL")
    add("--finetune_rate", type=float, default=5e-5)
    add("--test_windows", type=int, help="measure on so many windows only, to try things out")
    add("--work", type=Path, help="folder that keeps the model of the row 'window' for 'finetune'")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.model is None or arguments.prepared is None:
        parser.error("give --model, the folder of the original, and --prepared, the file that --prepare wrote")
    if "finetune" in arguments.rows and arguments.work is None:
        parser.error("the row 'finetune' needs --work, where the row 'window' keeps its model")


def main() -> None:
    command(__doc__, "conversion_smollm2", add_options, run, table, check=check, prepare=prepare)


if __name__ == "__main__":
    main()
