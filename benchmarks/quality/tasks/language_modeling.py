# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The text of `language_modeling.py` as one file of tokens: Wikipedia to train and validate on, WikiText-103 to test on.

WikiText is published in tokens of its own: `co @-@ operate`, `3 @.@ 5`, a space before every comma. Untokenised text such as
that of Wikipedia has none of this, so that a model trained on it finds it strange. Hence both evaluation sets of WikiText-103
are kept twice: as published, and with its tokenisation undone by the usual rules. Whatever the form, the words counted are
those of the published form, which makes the perplexities per word comparable.
"""

import random
import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality.tasks import corpora
from gma_hf.training.text.tokenization import train_tokenizer


VOCAB_SIZE = 16384
TOKENIZER_CHARACTERS = 30_000_000  # that the tokenizer is trained on
BATCH = 256  # documents that are tokenized together

# WikiText's tokenisation undone, in this order; as in the perplexity of GPT-2 that Megatron-LM and lm-evaluation-harness compute
DETOKENIZATION = [
    (r" @([-,.])@ ", r"\1"), (r" ([:;.!?,])(?= )", r"\1"), (r"\( *([^)\n]*?) *\)", r"(\1)"),
    (r"\[ *([^\]\n]*?) *\]", r"[\1]"), (r'" *([^"\n]*?) *"', r'"\1"'), (r"(?<!\S)' *([^'\n]*?) *'(?!\S)", r"'\1'"),
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="), (r" ° ", "°"),
    (r" '(?=(s|re|ve|ll|d|m|t)\b)", "'"), (r"s '(?= )", "s'"), (r" \n", "\n"), (r"\n ", "\n"),
]  # fmt: skip


def detokenize(text: str) -> str:
    """WikiText as one would write it."""
    for pattern, replacement in DETOKENIZATION:
        text = re.sub(pattern, replacement, text)
    return text


def prepare(data: Path, target: Path, vocab_size: int = VOCAB_SIZE, max_tokens: int | None = None) -> dict:
    """
    Train a tokenizer, tokenize everything, write it; the numbers of tokens. The tokenizer goes into a folder beside the file. The
    articles are in random order, so that `max_tokens` of them are a fair sample.
    """
    train = list(corpora.texts_of(data / "wikipedia-long" / "train.jsonl.xz"))
    random.Random(0).shuffle(train)
    sample, size = [], 0
    for text in train:
        if size >= TOKENIZER_CHARACTERS:
            break
        sample.append(text)
        size += len(text)
    tokenizer = train_tokenizer(iter(sample), vocab_size)
    tokenizer.save_pretrained(tokenizer_folder(target))

    def tokens_of(texts: list[str], limit: int | None = None) -> Tensor:
        """`<eot> document <eot> document ...`"""
        parts, count = [], 0
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(texts[start : start + BATCH], add_special_tokens=False, verbose=False)["input_ids"]
            # Every number below 2^16: half the size of int32
            parts += [torch.tensor([tokenizer.eos_token_id, *ids]).to(torch.uint16) for ids in batch]
            count += sum(len(ids) + 1 for ids in batch)
            if limit is not None and count >= limit:
                break
        return torch.cat(parts)[:limit]

    valid = list(corpora.texts_of(data / "wikipedia-long" / "valid.jsonl.xz"))
    prepared, counts = {"train": tokens_of(train, max_tokens), "wikipedia_valid": tokens_of(valid)}, {}
    for split in ("valid", "test"):
        text = corpora.text_of(data / "wikitext-103" / f"{split}.txt.xz")
        prepared[f"wikitext_{split}"] = tokens_of([text])
        prepared[f"wikitext_{split}_detokenized"] = tokens_of([detokenize(text)])
        counts[split] = {"words": len(text.split()), "lines": text.count("\n")}
    corpora.save({"tokens": prepared, "counts": counts, "vocab_size": len(tokenizer)}, target)
    return {name: len(tokens) for name, tokens in prepared.items()}


def load(path: Path) -> dict:
    """What `prepare` wrote: `tokens` by part, int32; `counts` of words and lines by split of WikiText; `vocab_size`."""
    prepared = corpora.load(path)
    # PyTorch indexes no uint16
    return {**prepared, "tokens": {name: tokens.to(torch.int32) for name, tokens in prepared["tokens"].items()}}


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer of a prepared file lies: `lm-tokenizer` beside `lm.pt` or `lm.pt.xz`."""
    return path.with_name(path.name.split(".")[0] + "-tokenizer")


def windows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """
    The stream of tokens cut so that every token but the first is predicted once: windows `[number of windows, length + 1]`, each
    beginning with the last token of the one before, and what is left, `[at most length]`, beginning likewise.
    """
    count, stride = (len(tokens) - 1) // length, tokens.stride(0)
    return tokens.as_strided((count, length + 1), (length * stride, stride)), tokens[count * length :]
