#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A sentence encoder (all-MiniLM-L6-v2, 6 layers) converted to GMA, distilled on unlabelled text.

    python benchmarks/conversion/minilm.py --model minilm --data DATA --prepare minilm.pt
    python benchmarks/conversion/minilm.py --model minilm --prepared minilm.pt --minutes 3

`--prepare` tokenizes: Wikipedia and books to train on, sentences of WikiText-103 and IMDB (test splits) to measure the cosine
between the embeddings of original and converted model, 20 Newsgroups to fine-tune both. DATA holds `wikipedia-long`, `books`,
`wikitext-103`, `imdb` and `20newsgroups`. Rows that the output file holds already are not repeated.
"""

import argparse
import random
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from benchmarks.conversion.stages import convert_and_distil
from benchmarks.lib.command import command
from benchmarks.lib.results import Results, device
from benchmarks.lib.tables import markdown, mean_and_spread
from benchmarks.lib.training import evaluating, train
from benchmarks.quality.tasks import corpora
from benchmarks.quality.tasks.classification import without_hints
from benchmarks.quality.tasks.language_modeling import detokenize
from gma_hf import convert_to_gma
from gma_hf.conversion.distillation.losses import pooled


LENGTH = 128  # tokens of a training text
TRAIN_TEXTS = 150_000
EVALUATION_SENTENCES = 2000
NEWSGROUPS_LENGTH = 256
TEXTS = ("WikiText-103", "IMDB")  # of the sentences that are embedded
# Options of `convert_to_gma`, and whether the mixtures are calibrated
ROWS = {
    "all layers, GMA alone": ({}, True),
    "all layers, GMA alone, random mixtures": ({}, False),
    "all layers, window of 8 to each side": ({"window_size": 8}, True),
}
ORIGINAL = "original, softmax"
# Short training: the first stage gets this share of the time
TRANSFER_SHARE = 0.25


def sentences_of(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"<br />|\s+", " ", text))
    return [sentence.strip() for sentence in found if 20 <= len(sentence.strip()) <= 400]


def training_texts(data: Path, count: int) -> list[str]:
    """Pieces of Wikipedia and of books, of one to eight sentences."""
    draw = random.Random(0)
    texts = []
    for name in ("wikipedia-long", "books"):
        enough = len(texts) + count // 2
        for row in corpora.rows_of(data / name / "train.jsonl.xz"):
            sentences = sentences_of(row["text"])
            # Not more of a book than of many articles
            sentences = sentences[: 4000 if name == "books" else 100]
            while sentences and len(texts) < enough:
                size = draw.randint(1, 8)
                texts.append(" ".join(sentences[:size]))
                sentences = sentences[size:]
            if len(texts) >= enough:
                break
    draw.shuffle(texts)
    return texts


def evaluation_sentences(data: Path) -> dict[str, list[str]]:
    lines = corpora.text_of(data / "wikitext-103" / "test.txt.xz").splitlines(keepends=True)
    text = detokenize("".join(line for line in lines if not line.startswith(" =")))  # without the titles of articles
    reviews = corpora.texts_of(data / "imdb" / "test.jsonl.xz")
    found = (sentences_of(text), [sentence for review in reviews for sentence in sentences_of(review)])
    return {name: random.Random(1).sample(own, EVALUATION_SENTENCES) for name, own in zip(TEXTS, found, strict=True)}


def prepare(arguments: argparse.Namespace) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def tokens(texts: list[str], length: int) -> list[np.ndarray]:
        ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        return [np.asarray(row, np.uint16) for row in ids]

    def flat(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        return {"tokens": torch.from_numpy(np.concatenate(rows).astype(np.int32)).to(torch.uint16), "lengths": lengths}

    prepared = {"train": flat(tokens(training_texts(arguments.data, arguments.texts), LENGTH))}
    for name, sentences in evaluation_sentences(arguments.data).items():
        prepared[name] = flat(tokens(sentences, LENGTH))
    for split in ("train", "test"):
        rows = list(corpora.rows_of(arguments.data / "20newsgroups" / f"{split}.jsonl.xz"))
        posts = flat(tokens([without_hints(row["text"]) for row in rows], NEWSGROUPS_LENGTH))
        prepared[f"newsgroups {split}"] = {**posts, "labels": torch.tensor([row["label"] for row in rows])}
    corpora.save(prepared, arguments.prepare)
    return {name: {key: tuple(x.shape) for key, x in part.items()} for name, part in prepared.items()}


def examples(part: dict[str, torch.Tensor]) -> list[dict]:
    rows = part["tokens"].to(torch.int32).split(part["lengths"].tolist())
    if "labels" not in part:
        return [{"input_ids": row} for row in rows]
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, part["labels"], strict=True)]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    tokens = [row["input_ids"].long() for row in rows]
    labels = {"labels": torch.stack([row["labels"] for row in rows])} if "labels" in rows[0] else {}
    mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    return {"input_ids": pad_sequence(tokens, batch_first=True), "attention_mask": mask, **labels}


def sorted_batches(rows: list[dict], size: int):
    """Batches of texts of about the same length, to measure fast."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), size):
        yield {name: x.to(device()) for name, x in collate(rows[start : start + size]).items()}


@torch.no_grad()
def cosines(model, teacher, prepared: dict) -> dict[str, float]:
    """The mean cosine between the embeddings of both models, of the sentences of each text."""
    found = {}
    for name in TEXTS:
        total = 0.0
        for batch in sorted_batches(prepared[name], 128):
            hidden = [m.eval()(**batch).last_hidden_state for m in (model, teacher)]
            total += F.cosine_similarity(*(pooled(x, batch["attention_mask"], "mean") for x in hidden)).sum().item()
        found[name] = round(total / len(prepared[name]), 4)
    return found


def converted(arguments: argparse.Namespace, prepared: dict, options: dict, is_calibrated: bool) -> tuple:
    """The distilled model, and its row."""
    torch.manual_seed(0)
    teacher = AutoModel.from_pretrained(arguments.model).to(device()).eval()
    model, train_rows, cosine = AutoModel.from_pretrained(arguments.model).to(device()), prepared["train"], {}

    def score(state: str) -> None:
        cosine[state] = cosines(model, teacher, prepared)
        print(f"{state:28s} {cosine[state]}", flush=True)

    batches = (collate(train_rows[i : i + 32]) for i in range(0, len(train_rows), 32))
    row = convert_and_distil(
        model, {"train_dataset": train_rows, "data_collator": collate, "teacher": teacher}, score,
        {"num_components": arguments.components, "use_routing_projections": True, **options},
        batches=batches if is_calibrated else None, calibration={"max_tokens": 100_000}, minutes=arguments.minutes,
        batch_size=arguments.batch_size, transfer_share=TRANSFER_SHARE, transfer_rate=1e-2, rate=2e-4,
        arguments={"logits_weight": 0.0, "hidden_weight": 1.0, "embedding_weight": 1.0, "gma_learning_rate": 2e-3},
    )  # fmt: skip
    score("after distillation")
    return model, {"options": {**options, "components": arguments.components}, "cosine": cosine, **row}


def classify(arguments: argparse.Namespace, prepared: dict, encoder, seed: int) -> float:
    """Accuracy in % on the test posts of 20 Newsgroups, after fine-tuning everything in the same way."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=20)
    if hasattr(encoder.config, "gma"):
        description = encoder.config.gma
        options = {name: value for name, value in description.items() if name not in ("layers", "softmax_layers")}
        convert_to_gma(model, **options)
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    rows, tests = prepared["newsgroups train"], prepared["newsgroups test"]

    def accuracy() -> float:
        right = 0
        with evaluating(model):
            for batch in sorted_batches(tests, 128):
                right += (model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum().item()
        return round(100 * right / len(tests), 2)

    steps = int(arguments.epochs * len(rows)) // 32
    recipe = {"steps": steps, "batch_size": 32, "learning_rate": 2e-4, "weight_decay": 0.01}
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": round(0.06 * steps), "adam_beta2": 0.999}
    return train(model, rows, collate, recipe, seed, accuracy, Trainer, **schedule)["curve"][-1][1]


def run(arguments: argparse.Namespace) -> None:
    """Measure the rows that the output file does not hold yet."""
    prepared = {name: examples(part) for name, part in corpora.load(arguments.prepared).items()}
    setting = {name: getattr(arguments, name) for name in ("minutes", "batch_size", "components", "epochs")}
    results = Results(arguments.output, "conversion.minilm", setting)

    def row(name: str) -> dict:
        if name == ORIGINAL:
            encoder, found = AutoModel.from_pretrained(arguments.model), {}
        else:
            encoder, found = converted(arguments, prepared, *ROWS[name])
        if arguments.epochs:
            found["newsgroups"] = [classify(arguments, prepared, encoder, seed) for seed in range(arguments.seeds)]
        return found

    for name in [*([ORIGINAL] if arguments.epochs else []), *arguments.rows]:
        results.measure(name, row, name)


def table(content: dict) -> str:
    """The cosine between the embeddings of original and converted model, and the accuracy of classifiers made of them."""
    lines = []
    for name, row in content["rows"].items():
        cosine = list(row["cosine"].values())[-1] if "cosine" in row else {}
        cells = [f"{cosine[text]:.4f}" if text in cosine else "" for text in TEXTS]
        accuracy = row.get("newsgroups", [])
        lines.append([name, *cells, mean_and_spread(accuracy) if accuracy else ""])
    columns = ["model", "cosine to the original, WikiText-103", "cosine, IMDB", "accuracy on 20 Newsgroups (%)"]
    return markdown(columns, lines)


def add_options(add) -> None:
    add("--model", type=Path, help="folder of the encoder")
    add("--texts", type=int, default=TRAIN_TEXTS, help="texts to train on, for --prepare")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--minutes", type=float, default=3.0, help="of training per row")
    add("--batch_size", type=int, default=128)
    add("--components", type=int, default=64)
    add("--epochs", type=float, default=3, help="of fine-tuning on 20 Newsgroups; 0 leaves it out")
    add("--seeds", type=int, default=2, help="runs of the fine-tuning")


def main() -> None:
    command(__doc__, "conversion_minilm", add_options, run, table, needs=("model", "prepared"), prepare=prepare)


if __name__ == "__main__":
    main()
