# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of a text with a confidence interval: how much another text of the same kind might change it."""

import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .files import load_files, resolve_files
from .metrics import perplexity, token_statistics
from .text.packing import PackedCollator, pack_documents
from .text.tokenization import separator_id


# Neighbouring windows belong to one article and are not independent: they are drawn together
RUN_LENGTH = 8
CONFIDENCE = 0.95


def bootstrap_perplexity(
    nll: np.ndarray,
    counts: np.ndarray,
    run_length: int = RUN_LENGTH,
    num_samples: int = 2000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Confidence interval of a perplexity by the circular moving-block bootstrap (Künsch, 1989).

    Runs of neighbouring windows are drawn with replacement, until there are as many windows as in the text.

    Args:
        nll (`np.ndarray` of shape `(windows,)`): sum of negative log-likelihoods of each window, in nats.
        counts (`np.ndarray` of shape `(windows,)`): number of predicted tokens of each window.
        run_length (`int`): windows per run; at most a tenth of all windows, so that there are runs to draw from.
        num_samples (`int`): number of bootstrap samples.
        confidence (`float`): confidence of the interval.
        seed (`int`): seed of the draws.

    Returns:
        `tuple[float, float]`: lower and upper bound of the perplexity per token.

    Raises:
        ValueError: with fewer than two windows, because one window has no spread.
    """
    nll, counts = np.asarray(nll, np.float64), np.asarray(counts, np.float64)
    num_windows = len(nll)
    if num_windows < 2:
        raise ValueError(f"A confidence interval needs at least two windows, got {num_windows}; use shorter ones.")
    run_length = min(run_length, max(1, num_windows // 10))
    runs = (np.arange(num_windows)[:, None] + np.arange(run_length)) % num_windows  # [windows, run_length]
    run_nll, run_counts = nll[runs].sum(1), counts[runs].sum(1)
    draw = np.random.default_rng(seed)
    losses = np.empty(num_samples)
    for i in range(num_samples):
        drawn = draw.integers(num_windows, size=math.ceil(num_windows / run_length))
        losses[i] = run_nll[drawn].sum() / run_counts[drawn].sum()
    low, high = np.quantile(losses, [(1 - confidence) / 2, (1 + confidence) / 2])
    return perplexity(low), perplexity(high)


@torch.no_grad()
def evaluate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patterns: list[str],
    block_size: int,
    batch_size: int = 8,
    text_documents: str = "file",
) -> dict[str, Any]:
    """
    Perplexity of a causal model on text files, in windows as in the training commands: every token counts once.

    Args:
        model (`PreTrainedModel`): the model, on its device. It is put into evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        patterns (`list[str]`): files, glob patterns or folders, see `resolve_files`.
        block_size (`int`): tokens per window. A window sees only the last token of the window before it.
        batch_size (`int`): windows per forward pass.
        text_documents (`str`): what a document is in plain text, see `load_files`.

    Returns:
        `dict`: `perplexity` and `word_perplexity` (per piece between white space), each with its `..._interval`;
        `num_tokens`, `num_words`, `num_windows`, `block_size`.
    """
    text = pack_documents(
        load_files(resolve_files(patterns), text_documents=text_documents),
        tokenizer,
        separator_id(tokenizer),
        block_size,
        "evaluation",
        predict_every_token=True,
        keep_last=True,
    )
    model.eval()
    reduce, collate = token_statistics(shift_labels=True), PackedCollator(tokenizer.pad_token_id or 0)
    statistics = []
    for start in range(0, len(text.blocks), batch_size):
        rows = text.blocks.select(range(start, min(start + batch_size, len(text.blocks))))
        batch = {name: x.to(model.device) for name, x in collate(list(rows)).items()}
        labels = batch.pop("labels")
        statistics.append(reduce(model(**batch, use_cache=False).logits, labels).cpu().double())
    nll, _, counts = torch.cat(statistics).numpy().T
    low, high = bootstrap_perplexity(nll, counts)
    # The same likelihood, shared among the words
    num_words = max(text.num_words, 1)
    exponent = counts.sum() / num_words
    return {
        "perplexity": perplexity(nll.sum() / counts.sum()),
        "perplexity_interval": [low, high],
        "word_perplexity": perplexity(nll.sum() / num_words),
        "word_perplexity_interval": [low**exponent, high**exponent],
        "num_tokens": int(counts.sum()),
        "num_words": text.num_words,
        "num_windows": len(nll),
        "block_size": block_size,
    }
