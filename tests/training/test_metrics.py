# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import math

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from gma_hf.training.metrics import accuracy_and_f1, language_model_metrics, perplexity, text_metrics, token_statistics
from gma_hf.training.text.packing import PackedText


def test_perplexity_of_a_uniform_guess_is_the_vocabulary_size():
    labels = torch.randint(0, 7, (3, 11))
    rows = token_statistics(shift_labels=True)(torch.zeros(3, 11, 7), labels)
    metrics = language_model_metrics(EvalPrediction(rows.numpy(), labels.numpy()))
    assert metrics["perplexity"] == pytest.approx(7, rel=1e-6)
    assert metrics["num_tokens"] == 3 * 10


@pytest.mark.parametrize("shift", [True, False])
def test_every_predicted_token_weighs_the_same_however_the_rows_are_batched(shift):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 9, 5), torch.randint(0, 5, (4, 9))
    labels[1, 3:] = -100
    labels[3, :8] = -100
    reduce = token_statistics(shift)
    together = reduce(logits, labels)
    apart = torch.cat([reduce((logits[:1],), labels[:1]), reduce(logits[1:], labels[1:])])
    assert torch.equal(together, apart)
    metrics = language_model_metrics(EvalPrediction(together.numpy(), labels.numpy()))
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten())
    # float32 sums of some 20 terms of order one
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    correct = (logits.argmax(-1) == labels)[labels != -100]
    assert metrics["accuracy"] == pytest.approx(correct.float().mean().item())


def test_accuracy_and_f1_by_hand():
    # Class 0: TP 2, FP 1, FN 1 -> 2/3. Class 1: TP 1, FP 1, FN 2 -> 2/5. Class 2: TP 1, FP 1, FN 0 -> 2/3.
    labels = np.array([0, 0, 0, 1, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 2, 2])
    scores = accuracy_and_f1(predicted, labels)
    assert scores == pytest.approx({"accuracy": 4 / 7, "f1_macro": (2 / 3 + 2 / 5 + 2 / 3) / 3})
    # Two classes: TP 2, FP 1, FN 1 of class 1 -> 2/3; class 0: TP 1, FP 1, FN 1 -> 1/2
    scores = accuracy_and_f1(np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0]))
    assert scores == pytest.approx({"accuracy": 3 / 5, "f1_binary": 2 / 3, "f1_macro": 7 / 12})


def test_scores_of_the_text_do_not_depend_on_the_tokens():
    text = PackedText(datasets.Dataset.from_dict({}), num_bytes=80, num_words=16, num_documents=1)
    coarse, fine = text_metrics(2.0, 20, text), text_metrics(1.0, 40, text)  # 40 nats both
    assert coarse == fine
    assert coarse["bits_per_byte"] == pytest.approx(40 / math.log(2) / 80)
    assert coarse["word_perplexity"] == pytest.approx(math.exp(40 / 16))


def test_an_overflowing_perplexity_is_infinite():
    assert perplexity(1e4) == math.inf
