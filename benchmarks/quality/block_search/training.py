# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The trainings of the search: recall tasks for several models side by side, and language models one by one."""

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.language_modeling import repeated_pairs
from benchmarks.quality.language_modeling_data import load, windows
from benchmarks.quality.recall import NEEDLE_TRAIN_LENGTHS, TRAIN_SEGMENTS
from benchmarks.quality.recall_tasks import (
    IGNORE_INDEX,
    NEEDLE_VOCAB_SIZE,
    RECALL_VOCAB_SIZE,
    TOKENS_PER_FACT,
    multi_query_recall,
    needle,
)

from .model import (
    Block,
    SideBySideAdamW,
    Sizes,
    block_forward,
    hidden_states,
    make_parameters,
    product_dtype,
    rms_norm,
    rows_of_sequences,
)


RECALL_TESTS = [(64, 4), (64, 16), (128, 32), (256, 64), (512, 128)]
NEEDLE_TESTS = [256, 1024, 2048, 4096, 8192]
DEPTHS = 11
ROW = {"recall": 256, "needle": 1024}  # tokens: a row holds several sequences that are shorter
TEST_ROWS = {"recall": 64, "needle": 32}  # at a time
TEST_BATCHES = 4
TOKENS_PER_STEP = {"recall": 16_384, "needle": 16_384, "lm": 65_536}
LM_MICRO_TOKENS = 32_768
SMALL = {"width": 128, "layers": 2, "heads": 2, "intermediate": 480}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """A linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def compiled(function: Callable, device: str) -> Callable:
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def answers(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[models, questions, vocab]` before every labelled position of every row, and the labels."""
    models = x.shape[0]
    asked = labels[..., 1:] != IGNORE_INDEX
    x = x[:, :, :-1][asked].view(models, -1, x.shape[-1])
    x = rms_norm(x, parameters["norm"][:, None]).to(product_dtype(x.device))
    logits = torch.bmm(x, parameters["embedding"].to(x.dtype).transpose(1, 2)).float()
    return logits, labels[..., 1:][asked].view(models, -1)


def draw_batches(
    task: str, rows: Callable[[int], int], seed: int, device: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Endless batches of one sequence length each: the length, tokens and labels, one sequence a row."""
    choose, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    while True:
        if task == "recall":
            length, pairs = choose.choice(TRAIN_SEGMENTS)
            yield length, *multi_query_recall(rows(length), length, pairs, generator)
        else:
            length = choose.choice(NEEDLE_TRAIN_LENGTHS)
            yield length, *needle(rows(length), length, generator, facts=length // TOKENS_PER_FACT)


def train_recall(
    task: str, block: Block, rates: list[float], seeds: list[int], steps: int, device: str | None = None
) -> dict:
    """
    Train and test a model for every rate and seed, all at once.

    Args:
        task: "recall" or "needle", as in `recall.py`.
        block: the mixer.
        rates, seeds: every pair of them is a model. The first seed also draws the data, differently for every model.
        steps: of 16,384 tokens.
        device: defaults to a GPU if there is one.

    Returns:
        `models`, the pairs, and `accuracy`, in % by test and model.
    """
    device = device or default_device()
    members = [(rate, seed) for rate in rates for seed in seeds]
    vocab, row, count = RECALL_VOCAB_SIZE if task == "recall" else NEEDLE_VOCAB_SIZE, ROW[task], len(members)
    sizes = Sizes(vocab=vocab, **SMALL)
    parameters = make_parameters(block, sizes, [seed for _, seed in members], device)
    optimizer = SideBySideAdamW(parameters, [rate for rate, _ in members], betas=(0.9, 0.98))
    forward = compiled(block_forward, device)
    rows = TOKENS_PER_STEP[task] // row
    batches = draw_batches(task, lambda length: count * rows * row // length, seeds[0], device)
    start = time.monotonic()
    for step in range(steps):
        length, tokens, labels = next(batches)
        tokens, labels = (x.view(count, rows, row) for x in (tokens, labels))
        masks = rows_of_sequences(row, length, device)
        x = hidden_states(parameters, tokens, masks, block, sizes, forward)
        logits, expected = answers(parameters, x, labels)
        loss = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="none").view(count, -1)
        loss.mean(dim=1).sum().backward()
        optimizer.step(schedule(step, steps, max(1, steps // 10), 0.0))
    return {
        "models": members,
        "parameters": sum(p.numel() for p in parameters.values()) // count,
        "train_seconds": round(time.monotonic() - start, 1),
        "accuracy": test_recall(task, parameters, block, sizes, count, device),
    }


@torch.no_grad()
def test_recall(task: str, parameters, block: Block, sizes: Sizes, count: int, device: str) -> dict[str, list[float]]:
    """Accuracy in % of every model; of the needle also at the worst depth."""
    generator, rows = torch.Generator(device).manual_seed(10_000), TEST_ROWS[task]

    def accuracy(length: int, tokens: Tensor, labels: Tensor) -> Tensor:
        tokens, labels = (x.expand(count, -1, -1) for x in (tokens, labels))
        x = hidden_states(parameters, tokens, rows_of_sequences(length, length, device), block, sizes)
        logits, expected = answers(parameters, x, labels)
        return 100 * (logits.argmax(dim=-1) == expected).float().mean(dim=1)

    found: dict[str, Tensor] = {}
    if task == "recall":
        for length, pairs in RECALL_TESTS:
            parts = (multi_query_recall(rows, length, pairs, generator) for _ in range(TEST_BATCHES))
            found[f"{pairs}@{length}"] = torch.stack([accuracy(length, *part) for part in parts]).mean(0)
    else:
        for length in NEEDLE_TESTS:
            depths = [i / (DEPTHS - 1) for i in range(DEPTHS)]
            scores = torch.stack([accuracy(length, *needle(rows, length, generator, depth=d)) for d in depths])
            found[f"needle@{length}"], found[f"needle@{length}, worst depth"] = scores.mean(0), scores.min(0).values
    return {name: [round(x, 1) for x in scores.tolist()] for name, scores in found.items()}


def head_loss(x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    x = rms_norm(x, norm).to(product_dtype(x.device))
    return F.cross_entropy((x @ embedding.to(x.dtype).T).float(), labels)


def train_language_model(
    block: Block,
    data: Path,
    rate: float,
    seed: int,
    steps: int,
    context: int,
    parameters: int,
    tokens_per_step: int = TOKENS_PER_STEP["lm"],
    sizes: dict | None = None,
    device: str | None = None,
) -> dict:
    """
    Train a language model on one pass over (a part of) the text and measure its perplexity.

    Args:
        block: the mixer.
        data: file of `language_modeling.py --prepare`.
        rate, seed, steps, context: of the training.
        parameters: number that the width of the MLP is chosen for.
        tokens_per_step: of the training.
        sizes: width, layers and heads; by default 512, 8, 8.
        device: defaults to a GPU if there is one.

    Returns:
        Perplexities of the validation text: all, of the tokens that complete a pair of tokens which the window has shown
        before ("repeated"), and of the others.
    """
    device = device or default_device()
    prepared = load(data)
    shape = {"width": 512, "layers": 8, "heads": 8, **(sizes or {}), "vocab": prepared["vocab_size"]}
    smallest, larger = (
        sum(p.numel() for p in make_parameters(block, Sizes(**shape, intermediate=n), [seed], "cpu").values())
        for n in (8, 16)
    )
    intermediate = 8 + 8 * max(0, round((parameters - smallest) / (larger - smallest)))
    chosen = Sizes(**shape, intermediate=intermediate)
    weights = make_parameters(block, chosen, [seed], device)
    optimizer = SideBySideAdamW(weights, [rate], betas=(0.9, 0.95))
    forward, loss_of = compiled(block_forward, device), compiled(head_loss, device)
    masks = rows_of_sequences(context, context, device)
    blocks, _ = windows(prepared["tokens"]["train"], context)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    rows, start, losses = tokens_per_step // context, time.monotonic(), []
    for step in range(steps):
        batch = blocks[order[torch.arange(step * rows, (step + 1) * rows) % len(order)]].long().to(device)
        for part in batch.split(max(1, min(LM_MICRO_TOKENS, tokens_per_step) // context)):
            x = hidden_states(weights, part[None, :, :-1], masks, block, chosen, forward)
            loss = loss_of(x.flatten(0, 2), weights["norm"][0], weights["embedding"][0], part[:, 1:].flatten())
            (loss * len(part) / len(batch)).backward()
        optimizer.step(schedule(step, steps, min(100, max(1, steps // 8)), 0.1))
        if (step + 1) % max(1, steps // 20) == 0:
            losses.append([step + 1, round(loss.item(), 4)])
    return {
        "parameters": sum(p.numel() for p in weights.values()),
        "train_seconds": round(time.monotonic() - start, 1),
        "losses": losses,
        "wikipedia_valid": perplexities(weights, prepared["tokens"]["wikipedia_valid"], context, block, chosen),
    }


@torch.no_grad()
def perplexities(parameters, tokens: Tensor, context: int, block: Block, sizes: Sizes) -> dict[str, float]:
    """Perplexity of all tokens, of those that complete a pair which their window has shown before, and of the others."""
    device = parameters["norm"].device
    masks, batches = rows_of_sequences(context, context, device), windows(tokens, context)[0]
    nats = {"all": 0.0, "repeated": 0.0, "others": 0.0}
    counts = dict.fromkeys(nats, 0)
    for part in batches.long().split(max(1, 16_384 // context)):
        part = part.to(device)
        x = hidden_states(parameters, part[None, :, :-1], masks, block, sizes)[0]
        x = rms_norm(x, parameters["norm"][0]).to(product_dtype(device))
        logits = (x @ parameters["embedding"][0].to(x.dtype).T).float()
        nll = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").view(len(part), -1)
        repeated = repeated_pairs(part)
        for name, chosen in (("all", torch.ones_like(repeated)), ("repeated", repeated), ("others", ~repeated)):
            nats[name] += nll[chosen].double().sum().item()
            counts[name] += int(chosen.sum())
    found = {name: round(math.exp(nats[name] / max(1, counts[name])), 3) for name in nats}
    return {**found, "share_repeated": round(counts["repeated"] / counts["all"], 4)}
