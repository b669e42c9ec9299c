# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The data sets of long_context_classification.py: how they are tokenized, kept in one file, and cut into batches."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.quality.tasks import corpora, listops


@dataclass(frozen=True)
class Task:
    """A data set and how to train on it."""

    title: str
    num_labels: int
    vocab_size: int
    pad_token_id: int
    max_length: int
    steps: int
    dropout: float


TASKS = {
    "listops": Task("ListOps, 500 to 2,000 symbols", 10, listops.VOCAB_SIZE, listops.PAD, 2048, 5000, 0.0),
    "imdb": Task("IMDB, bytes up to 4,096", 2, 257, 0, 4096, 2000, 0.1),
    "newsgroups": Task("20 Newsgroups, tokens up to 2,048", 20, 8192, 1, 2048, 2000, 0.2),
}
LENGTH_STEP = 256  # lengths of batches are multiples of it
HELD_OUT = 1000


class Examples(Dataset):
    """Sequences of tokens of different length, one after the other in one array, and their classes."""

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray):
        self.tokens, self.lengths, self.labels = tokens, np.asarray(lengths), np.asarray(labels)
        self.ends = np.cumsum(self.lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        end = self.ends[index]
        return {"input_ids": self.tokens[end - self.lengths[index] : end], "labels": self.labels[index]}

    def select(self, indices: np.ndarray) -> "Examples":
        rows = [self[i] for i in indices]
        return Examples(
            np.concatenate([row["input_ids"] for row in rows]), self.lengths[indices], self.labels[indices]
        )

    @property
    def majority_accuracy(self) -> float:
        """The accuracy of always guessing the commonest class."""
        return float(np.bincount(self.labels).max() / len(self))


def rounded_up(length: int) -> int:
    """The length that batches with such an example are padded to."""
    return -(-int(length) // LENGTH_STEP) * LENGTH_STEP


def collate(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A padded batch: tokens `[batch, length]`, the mask that marks the real ones, and classes `[batch]`."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    tokens = np.full((len(rows), rounded_up(lengths.max())), pad_token_id, np.int64)
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]] = row["input_ids"]
    return {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None]).long(),
        "labels": torch.tensor([int(row["labels"]) for row in rows]),
    }


def batches_by_length(examples: Examples, pad_token_id: int, tokens_per_batch: int) -> Iterator[dict]:
    """All examples in batches of about the same size in tokens, the longest first: what fits once fits always."""
    order = np.argsort(-examples.lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + max(1, tokens_per_batch // rounded_up(examples.lengths[order[start]]))
        yield collate([examples[i] for i in order[start:end]], pad_token_id)
        start = end


def without_hints(post: str) -> str:
    """A post without header, quotes and signature, which give its group away: the rules that scikit-learn follows."""
    _, _, body = post.partition("\n\n")
    quote = re.compile(r"writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^\||^>")
    lines = [line for line in body.strip().split("\n") if not quote.search(line)]
    # A signature is what follows the last empty line or line of dashes
    ends = [i for i, line in enumerate(lines) if line.strip().strip("-") == ""]
    return "\n".join(lines[: ends[-1]] if ends and ends[-1] > 0 else lines)


def prepare(data: Path, file: Path) -> None:
    """Tokenize the texts into one compressed file."""
    from gma_hf.training.text.tokenization import train_tokenizer

    prepared = {}
    for split in ("train", "test"):
        rows = list(corpora.rows_of(data / "imdb" / f"{split}.jsonl.xz"))
        texts = [row["text"].encode()[: TASKS["imdb"].max_length] for row in rows]
        # Token 0 is padding, so byte b is token b + 1: stored as bytes, shifted when loaded
        prepared[f"imdb {split}"] = packed(texts, [row["label"] for row in rows], np.uint8)

    task = TASKS["newsgroups"]
    posts = {split: list(corpora.rows_of(data / "20newsgroups" / f"{split}.jsonl.xz")) for split in ("train", "test")}
    texts = {split: [without_hints(row["text"]) for row in rows] for split, rows in posts.items()}
    tokenizer = train_tokenizer(iter(texts["train"]), task.vocab_size)
    for split, rows in posts.items():
        ids = tokenizer(texts[split], truncation=True, max_length=task.max_length - 1)["input_ids"]
        # Nothing may be left of a post: the end of the text always is
        ids = [np.array([*row, tokenizer.eos_token_id], np.uint16) for row in ids]
        prepared[f"newsgroups {split}"] = packed(ids, [row["label"] for row in rows], np.uint16)
    corpora.save(prepared, file)
    for name, part in prepared.items():
        lengths = part["lengths"]
        long = (lengths >= 1024).float().mean()
        print(
            f"{name}: {len(lengths):,} texts, {lengths.sum():,} tokens, longest {lengths.max():,}, {long:.1%} >= 1,024"
        )


def packed(texts: list, labels: list[int], dtype: type) -> dict[str, torch.Tensor]:
    arrays = [np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text for text in texts]
    return {
        "tokens": torch.from_numpy(np.concatenate(arrays).astype(dtype)),
        "lengths": torch.tensor([len(array) for array in arrays], dtype=torch.int32),
        "labels": torch.tensor(labels, dtype=torch.uint8),
    }


def load(
    task: str, prepared: Path | None, listops_sizes: Sequence[int], listops_lengths: Sequence[int] = (500, 2000)
) -> dict[str, Examples]:
    """The splits train, valid and test of a task."""
    if task == "listops":
        splits = {}
        for index, (split, count) in enumerate(zip(("train", "valid", "test"), listops_sizes, strict=True)):
            splits[split] = Examples(*listops.generate(count, [0, index], *listops_lengths))
        return splits
    if prepared is None:
        raise SystemExit(f"error: the task {task!r} needs the file that --prepare writes; give it by --prepared.")
    parts, found = corpora.load(prepared), {}
    for split in ("train", "test"):
        tokens, lengths, labels = (parts[f"{task} {split}"][name].numpy() for name in ("tokens", "lengths", "labels"))
        if task == "imdb":
            tokens = tokens.astype(np.uint16) + 1
        found[split] = Examples(tokens, lengths.astype(np.int64), labels.astype(np.int64))
    order = np.random.default_rng(0).permutation(len(found["train"]))
    held_out = min(HELD_OUT, len(order) // 10)
    return {
        "train": found["train"].select(order[held_out:]),
        "valid": found["train"].select(order[:held_out]),
        "test": found["test"],
    }
