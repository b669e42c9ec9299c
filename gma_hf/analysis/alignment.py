# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How well two labellings of the same tokens agree, from the table of their joint counts, and what chance would give.

With joint shares p_ck of component c and category k, and their marginals p_c, p_k:

    I   = sum_ck p_ck log( p_ck / (p_c p_k) )                 mutual information
    NMI = 2 I / (H(c) + H(k)),  H(p) = -sum p log p           normalised by the mean of the entropies, in [0, 1]
    purity = sum_c max_k p_ck                                 share of tokens whose category is their component's majority

NMI is 0 when both labellings are constant. Neither measure is 0 by chance: many components separate a finite text a
little even at random. The control is a permutation test: the categories are shuffled among the tokens. Only the table
of counts changes by that, and as components and categories keep their sizes, the table is a draw from the multivariate
hypergeometric distribution, so no token has to be kept.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Alignment:
    """Agreement of the components of every head with the categories of tokens.

    Attributes:
        nmi, purity: `[heads]`, of the text.
        nmi_shuffled_mean, nmi_shuffled_std, purity_shuffled_mean, purity_shuffled_std: `[heads]`, over the shuffles.
    """

    nmi: Tensor
    purity: Tensor
    nmi_shuffled_mean: Tensor
    nmi_shuffled_std: Tensor
    purity_shuffled_mean: Tensor
    purity_shuffled_std: Tensor


def normalized_mutual_information(counts: Tensor) -> Tensor:
    """NMI of two labellings, see this file's opening.

    Args:
        counts: `[..., components, categories]`, how often they meet.

    Returns:
        `[...]`, float64, from 0 (independent) to 1 (each determines the other).
    """
    joint = _shares(counts)
    entr = torch.special.entr
    entropies = entr(joint.sum(dim=-1)).sum(dim=-1) + entr(joint.sum(dim=-2)).sum(dim=-1)
    information = entropies - entr(joint).sum(dim=(-2, -1))
    # Both entropies are 0 when there is nothing to tell apart; rounding leaves 1e-16 or so of information
    return torch.where(entropies > 0, 2 * information / entropies, 0.0).clamp(0, 1)


def purity(counts: Tensor) -> Tensor:
    """Share of tokens whose category is the most frequent one of their component.

    Args:
        counts: `[..., components, categories]`.

    Returns:
        `[...]`, float64, in (0, 1].
    """
    return _shares(counts).amax(dim=-1).sum(dim=-1)


def shuffled_counts(counts: Tensor, generator: np.random.Generator) -> Tensor:
    """The table of counts after shuffling the categories among the tokens.

    Args:
        counts: `[components, categories]`, whole numbers.
        generator: source of randomness.

    Returns:
        `[components, categories]` with the same sums of rows and columns.
    """
    table = counts.long().numpy()
    left = table.sum(axis=0)
    shuffled = np.zeros_like(table)
    for component, size in enumerate(table.sum(axis=1)):
        if size > 0:
            shuffled[component] = generator.multivariate_hypergeometric(left, size, method="marginals")
            left = left - shuffled[component]
    return torch.from_numpy(shuffled)


def align(counts: Tensor, num_shuffles: int = 20, seed: int = 0) -> Alignment:
    """Alignment of components with categories, and its shuffled control.

    Args:
        counts: `[heads, components, categories]`, on the CPU.
        num_shuffles: number of permutations, at least 2.
        seed: of the permutations.

    Raises:
        ValueError: with less than 2 permutations, which have no standard deviation.
    """
    if num_shuffles < 2:
        raise ValueError(f"num_shuffles must be at least 2, got {num_shuffles}: one shuffle has no spread.")
    generator = np.random.default_rng(seed)
    shuffled = torch.stack(
        [torch.stack([shuffled_counts(table, generator) for table in counts]) for _ in range(num_shuffles)]
    )
    nmi, pure = normalized_mutual_information(shuffled), purity(shuffled)
    return Alignment(
        nmi=normalized_mutual_information(counts),
        purity=purity(counts),
        nmi_shuffled_mean=nmi.mean(dim=0),
        nmi_shuffled_std=nmi.std(dim=0),
        purity_shuffled_mean=pure.mean(dim=0),
        purity_shuffled_std=pure.std(dim=0),
    )


def _shares(counts: Tensor) -> Tensor:
    counts = counts.double()
    return counts / counts.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
