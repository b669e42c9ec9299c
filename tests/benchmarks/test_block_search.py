# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The prototypes of the block search compute what their equations say, and models side by side do not see each other."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality.block_search import training
from benchmarks.quality.block_search.model import Block, Sizes, hidden_states, make_parameters, rows_of_sequences
from benchmarks.quality.block_search.operators import decayed_read, delta_rule_read, features
from benchmarks.quality.block_search.run import CORRELATED, ROWS


TOLERANCE = 1e-5  # float32 sums of some hundred terms


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def inputs() -> dict:
    batch, length, dim = (2, 2, 2), 256, 8
    key = draw(*batch, length, dim, seed=1)
    return {
        "query": draw(*batch, length, dim, seed=2),
        "key": key / key.norm(dim=-1, keepdim=True),
        "value": draw(*batch, length, dim, seed=3),
        "weight": draw(*batch, length, seed=4).sigmoid(),
        "log_decay": -0.05 * draw(*batch, length, seed=5).exp(),
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("sequence_length", [64, 128, 256])
@pytest.mark.parametrize("rule", ["additive", "delta"])
def test_chunks_compute_the_recurrence(inputs, sequence_length, rule):
    query, key, value, weight, log_decay = (x.unbind(-2 if x.dim() == 5 else -1) for x in inputs.values())
    state, share, total, expected = torch.zeros(2, 2, 2, 8, 8, dtype=torch.float64), 0.3, 0.0, []
    for t in range(256):
        keep = 0.0 if t % sequence_length == 0 else 1.0
        decay = keep * log_decay[t].exp()[..., None]
        state, total = state * decay[..., None], total * decay
        if rule == "delta":
            known = (key[t][..., None, :] @ state)[..., 0, :]
            state = state + weight[t][..., None, None] * key[t][..., None] * (value[t] - known)[..., None, :]
            expected.append((query[t][..., None, :] @ state)[..., 0, :])
        else:
            written = weight[t][..., None] * value[t]
            state, total = state + key[t][..., None] * written[..., None, :], total + written
            expected.append((query[t][..., None, :] @ state)[..., 0, :] + share * total)
    earlier, _ = rows_of_sequences(256, sequence_length, "cpu")
    arguments = [x.float() for x in inputs.values()]
    if rule == "delta":
        found = delta_rule_read(*arguments, earlier)
    else:
        found = decayed_read(*arguments, earlier, torch.full((2, 2, 1, 1, 1, 1), share))
    assert relative_error(found, torch.stack(expected, dim=-2)) < TOLERANCE


def test_features_of_the_correlated_block_are_correlations_of_the_package_s_responsibilities():
    from gma_hf.ops import gaussian_mixture_responsibilities

    sizes = Sizes(vocab=8, width=32, layers=1, heads=2, intermediate=8)
    parameters = make_parameters(replace(CORRELATED, components=16), sizes, [0], "cpu")
    mixture = {name: parameters[f"0.{name}"] for name in ("means", "raw_variances", "prior_logits")}
    x = draw(1, 2, 40, 16).float()
    found = features(x, mixture, replace(CORRELATED, components=16))
    gamma = gaussian_mixture_responsibilities(x, *(p[0] for p in mixture.values()), variance_floor=1e-4)
    expected = torch.stack([torch.corrcoef(head) for head in gamma[0]])
    # 1e-8 beside the variance of the responsibilities, some 0.1 of their mean's square
    assert (found[0] @ found[0].transpose(1, 2) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", list(ROWS))
def test_a_model_beside_others_is_the_model_alone(name):
    block = replace(ROWS[name], components=16)
    sizes = Sizes(vocab=50, width=32, layers=2, heads=2, intermediate=16)
    tokens = torch.randint(50, (1, 2, 128), generator=torch.Generator().manual_seed(0))
    masks = rows_of_sequences(128, 64, "cpu")
    pair = hidden_states(make_parameters(block, sizes, [3, 4], "cpu"), tokens.expand(2, -1, -1), masks, block, sizes)
    alone = hidden_states(make_parameters(block, sizes, [4], "cpu"), tokens, masks, block, sizes)
    torch.testing.assert_close(pair[1:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(ROWS))
def test_sequences_of_a_row_do_not_see_each_other_or_the_future(name):
    block = replace(ROWS[name], components=16)
    sizes = Sizes(vocab=50, width=32, layers=2, heads=2, intermediate=16)
    parameters = make_parameters(block, sizes, [0], "cpu")
    tokens = torch.randint(50, (1, 1, 128), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[..., 40:64] = 0
    masks = rows_of_sequences(128, 64, "cpu")
    first, second = (hidden_states(parameters, x, masks, block, sizes) for x in (tokens, changed))
    assert (first[..., 40:64, :] != second[..., 40:64, :]).any()
    torch.testing.assert_close(first[..., :40, :], second[..., :40, :])
    torch.testing.assert_close(first[..., 64:, :], second[..., 64:, :])


def test_rows_train_and_are_tested(monkeypatch):
    monkeypatch.setattr(training, "TRAIN_SEGMENTS", [(64, 4), (256, 8)])
    monkeypatch.setattr(training, "RECALL_TESTS", [(64, 4)])
    monkeypatch.setattr(training, "TOKENS_PER_STEP", {"recall": 512})
    monkeypatch.setattr(training, "TEST_ROWS", {"recall": 2})
    monkeypatch.setattr(training, "SMALL", {"width": 32, "layers": 1, "heads": 2, "intermediate": 16})
    row = training.train_recall("recall", Block(), [1e-3, 1e-2], [0, 1], 2, "cpu")
    assert row["models"] == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
    assert len(row["accuracy"]["4@64"]) == 4


def test_language_models_train_and_are_tested(tmp_path):
    from benchmarks.quality.language_modeling_data import save

    tokens = torch.arange(3000) % 7  # every token tells the next
    path = tmp_path / "lm.pt"
    save(
        {
            "tokens": {"train": tokens.to(torch.uint16), "wikipedia_valid": tokens.to(torch.uint16)},
            "counts": {},
            "vocab_size": 50,
        },
        path,
    )
    sizes = {"width": 32, "layers": 1, "heads": 2}
    row = training.train_language_model(CORRELATED, path, 1e-2, 0, 60, 64, 20_000, 512, sizes, "cpu")
    assert abs(row["parameters"] - 20_000) < 500
    assert row["wikipedia_valid"]["all"] < 7  # guessing among the seven
