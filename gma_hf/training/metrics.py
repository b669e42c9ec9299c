# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of evaluation: perplexity, accuracy and F1, exact over batches and processes of any size."""

import importlib.util
import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from .errors import TrainingInputError
from .text.packing import IGNORE_INDEX, PackedText


def perplexity(nll: float) -> float:
    """exp of a negative log-likelihood per token in nats; infinity if it overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def token_statistics(shift_labels: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    A `preprocess_logits_for_metrics` that reduces logits to three numbers per row, so that evaluation needs little memory.

    Args:
        shift_labels (`bool`): `True` for causal models (position i predicts label i + 1), `False` for masked models.

    Returns:
        `Callable`: from logits `[batch, length, vocabulary]` and labels `[batch, length]` to `[batch, 3]`: sum of negative
        log-likelihoods (nats), correct predictions, predicted tokens.
    """

    def reduce(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        if shift_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # Row by row: the float32 copy of one row's logits is small next to the logits themselves
        return torch.stack([row_statistics(*row) for row in zip(logits, labels, strict=True)])

    def row_statistics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nll = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        counted = labels != IGNORE_INDEX
        correct = (logits.argmax(dim=-1) == labels) & counted
        # float32 holds these sums exactly enough: one row has at most some 10^5 tokens
        return torch.stack([nll, correct.sum().float(), counted.sum().float()])

    return reduce


def language_model_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Sum the results of `token_statistics`: loss per token, perplexity, accuracy and number of predicted tokens."""
    nll, correct, count = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = nll / max(count, 1.0)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "accuracy": correct / max(count, 1.0),
        "num_tokens": int(count),
    }


def text_metrics(loss: float, num_tokens: int, text: PackedText) -> dict[str, float]:
    """
    Scores that do not depend on the tokenizer, from the loss over every token of a text.

    Args:
        loss (`float`): negative log-likelihood per token, in nats.
        num_tokens (`int`): number of tokens of this mean.
        text (`PackedText`): the text, for its size.

    Returns:
        `dict[str, float]`: `bits_per_byte`, and `word_perplexity` per piece between white space (as in
        lm-evaluation-harness).
    """
    nll = loss * num_tokens
    return {
        "bits_per_byte": nll / math.log(2) / max(text.num_bytes, 1),
        "word_perplexity": perplexity(nll / max(text.num_words, 1)),
    }


def predicted_classes(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """A `preprocess_logits_for_metrics` for classification: the most likely class of each row, `[batch]`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and F1 of predicted classes (see `predicted_classes`)."""
    return accuracy_and_f1(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def accuracy_and_f1(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Accuracy, macro F1, and, if the classes are 0 and 1, also the F1 of class 1, as scikit-learn defines them.

    The macro mean runs over the classes that occur among labels or predictions. 0 / 0 gives an F1 of 0.

    Args:
        predicted (`np.ndarray` of shape `(n,)`): class indices.
        labels (`np.ndarray` of shape `(n,)`): class indices.

    Returns:
        `dict[str, float]`: the scores by name.
    """
    from sklearn.metrics import accuracy_score, f1_score

    def f1(**options) -> float:
        return float(f1_score(labels, predicted, average="macro", zero_division=0.0, **options))

    metrics = {"accuracy": float(accuracy_score(labels, predicted)), "f1_macro": f1()}
    if set(np.union1d(predicted, labels).tolist()) <= {0, 1}:
        metrics["f1_binary"] = f1(labels=[1])
    return metrics


def expect_scikit_learn() -> None:
    """
    Check that scikit-learn, which computes accuracy and F1, is installed.

    Raises:
        TrainingInputError: if it is not.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise TrainingInputError(
            "Accuracy and F1 are computed by scikit-learn, which is not installed: pip install 'gma_hf[classification]'."
        )
