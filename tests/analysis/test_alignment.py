# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Agreement of two labellings: the known values, and a control that keeps what shuffling keeps."""

import numpy as np
import pytest
import torch

from gma_hf.analysis import TokenBatch, align, collect_statistics, normalized_mutual_information, purity
from gma_hf.analysis.alignment import shuffled_counts


@pytest.mark.quick
def test_identical_labels_agree_whatever_their_order_and_sizes():
    counts = torch.diag(torch.tensor([5, 1, 30, 7]))[[2, 0, 3, 1]]
    assert normalized_mutual_information(counts).item() == pytest.approx(1)
    assert purity(counts).item() == pytest.approx(1)


@pytest.mark.quick
def test_independent_labels_share_no_information():
    counts = torch.tensor([2, 3, 5])[:, None] * torch.tensor([7, 1, 4, 2])
    assert normalized_mutual_information(counts).item() == pytest.approx(0, abs=1e-12)
    assert purity(counts).item() == pytest.approx(7 / 14)  # the share of the largest category


@pytest.mark.quick
def test_nmi_of_a_table_written_out():
    # Two components, two categories: H(c) = H(k) = log 2; I = log 2 - H(3/4, 1/4)
    counts = torch.tensor([[3, 1], [1, 3]])
    conditional = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert normalized_mutual_information(counts).item() == pytest.approx(1 - conditional / np.log(2))
    assert purity(counts).item() == pytest.approx(0.75)


@pytest.mark.quick
def test_nothing_to_tell_apart_is_no_agreement():
    assert normalized_mutual_information(torch.tensor([[9, 0], [0, 0]])).item() == 0
    assert normalized_mutual_information(torch.zeros(3, 4)).item() == 0


@pytest.mark.quick
def test_shuffling_keeps_the_sizes_and_loses_the_agreement():
    counts = torch.diag(torch.tensor([400, 300, 300]))
    shuffled = shuffled_counts(counts, np.random.default_rng(0))
    for dim in (0, 1):
        assert torch.equal(shuffled.sum(dim), counts.sum(dim))
    found = align(counts[None], num_shuffles=20)
    # Of N tokens, independent labels share (rows - 1) (columns - 1) / 2N nats of information in the mean, here 0.002;
    # the entropies are 1.09
    assert found.nmi_shuffled_mean.item() == pytest.approx(4 / 2000 / 1.09, rel=0.6)
    assert 0 < found.nmi_shuffled_std.item() < 0.005
    assert found.purity_shuffled_mean.item() == pytest.approx(0.4, abs=0.03)


def test_the_control_is_that_of_shuffled_labels():
    """Mean and spread over drawn tables are those over permutations of the tokens themselves."""
    generator = np.random.default_rng(0)
    components, categories = generator.integers(0, 5, 300), generator.choice(3, 300, p=[0.6, 0.3, 0.1])

    def table(labels):
        return torch.from_numpy(np.histogram2d(components, labels, bins=(5, 3), range=((0, 5), (0, 3)))[0])

    found = align(table(categories)[None], num_shuffles=400)
    permuted = torch.stack(
        [normalized_mutual_information(table(generator.permutation(categories))) for _ in range(400)]
    )
    # Standard error of a mean of 400 is a twentieth of the spread; of a spread about 4 %
    assert found.nmi_shuffled_mean.item() == pytest.approx(permuted.mean().item(), abs=0.25 * permuted.std().item())
    assert found.nmi_shuffled_std.item() == pytest.approx(permuted.std().item(), rel=0.25)


def test_a_seed_gives_the_same_control():
    counts = torch.randint(0, 50, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    first, again, other = (align(counts, seed=seed).nmi_shuffled_mean for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="at least 2"):
        align(counts, num_shuffles=1)


@pytest.mark.quick
def test_components_that_are_the_categories_align_fully(one_mixture):
    """A mixture that was built so: token i belongs to component i mod 4, and so does its category."""
    ids = torch.randint(0, 12, (3, 50), generator=torch.Generator().manual_seed(0))
    model = one_mixture([token % 4 for token in range(12)])
    (layer,) = collect_statistics(model, [TokenBatch({"input_ids": ids}, ids % 4)], num_categories=4).values()
    for statistics in (layer.queries, layer.keys):
        found = align(statistics.category_counts)
        assert found.nmi.item() == pytest.approx(1) and found.purity.item() == pytest.approx(1)
        assert found.nmi_shuffled_mean.item() < 0.1
        assert statistics.entropy.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("counts", [torch.full((1, 2, 2), float("nan")), -torch.ones(1, 2, 2), torch.ones(2, 2)])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match="counts must be numbers that are not negative, of shape"):
        align(counts)


@pytest.mark.parametrize("number", [1, 2.5, None])
def test_a_number_of_shuffles_that_has_no_spread_is_refused(number):
    with pytest.raises(ValueError, match="num_shuffles must be a whole number of at least 2"):
        align(torch.ones(1, 2, 2), num_shuffles=number)
