# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
How well two labellings of the same tokens agree, computed from the table of their joint counts, and what chance gives.

With joint shares p_ck of component c and category k, and their marginals p_c, p_k:

    I   = sum_ck p_ck log( p_ck / (p_c p_k) )                 mutual information
    NMI = 2 I / (H(c) + H(k)),  H(p) = -sum p log p           normalised by the mean of the entropies, in [0, 1]
    purity = sum_c max_k p_ck                                 share of tokens whose category is their component's majority

NMI is 0 when both labellings are constant. By chance neither measure is 0: in a finite text, many components separate the
categories a little even at random. The control is a permutation test that shuffles the categories among the tokens.
Shuffling changes the table of counts only, and keeps the sizes of components and categories. So the shuffled table is a draw
from the multivariate hypergeometric distribution, and no token has to be kept.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Alignment:
    """
    Agreement of the components of every head with the categories of tokens.

    Args:
        nmi (`torch.Tensor` of shape `(heads,)`): normalised mutual information of the text.
        purity (`torch.Tensor` of shape `(heads,)`): purity of the text.
        nmi_shuffled_mean (`torch.Tensor` of shape `(heads,)`): mean of the NMI over the shuffles.
        nmi_shuffled_std (`torch.Tensor` of shape `(heads,)`): standard deviation of the NMI over the shuffles.
        purity_shuffled_mean (`torch.Tensor` of shape `(heads,)`): mean of the purity over the shuffles.
        purity_shuffled_std (`torch.Tensor` of shape `(heads,)`): standard deviation of the purity over the shuffles.
    """

    nmi: Tensor
    purity: Tensor
    nmi_shuffled_mean: Tensor
    nmi_shuffled_std: Tensor
    purity_shuffled_mean: Tensor
    purity_shuffled_std: Tensor


def normalized_mutual_information(counts: Tensor) -> Tensor:
    """
    Normalised mutual information of two labellings. The formula stands at the top of this file.

    Args:
        counts (`torch.Tensor` of shape `(..., components, categories)`): how often each pair occurs.

    Returns:
        `torch.Tensor` of shape `(...)`: float64, from 0 (independent) to 1 (each labelling determines the other).
    """
    joint = _shares(counts)
    entr = torch.special.entr
    entropies = entr(joint.sum(dim=-1)).sum(dim=-1) + entr(joint.sum(dim=-2)).sum(dim=-1)
    information = entropies - entr(joint).sum(dim=(-2, -1))
    # Both entropies are 0 when both labellings are constant; rounding leaves 1e-16 or so of information
    return torch.where(entropies > 0, 2 * information / entropies, 0.0).clamp(0, 1)


def purity(counts: Tensor) -> Tensor:
    """
    Share of tokens whose category is the most frequent category of their component.

    Args:
        counts (`torch.Tensor` of shape `(..., components, categories)`): how often each pair occurs.

    Returns:
        `torch.Tensor` of shape `(...)`: float64, in (0, 1].
    """
    return _shares(counts).amax(dim=-1).sum(dim=-1)


def shuffled_counts(counts: Tensor, generator: np.random.Generator) -> Tensor:
    """
    The table of counts `(components, categories)` after shuffling the categories among the tokens. The sums of rows and
    columns stay.
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
    """
    Measure the agreement of components with categories, and its shuffled control.

    Args:
        counts (`torch.Tensor` of shape `(heads, components, categories)`): how often each pair occurs; on the CPU.
        num_shuffles (`int`, *optional*, defaults to `20`): number of shuffles, at least 2.
        seed (`int`, *optional*, defaults to `0`): seed of the shuffles.

    Returns:
        [`Alignment`]: one number per head and measure.

    Raises:
        ValueError: with less than 2 shuffles, because one shuffle has no standard deviation; for counts of another shape,
            or with negative numbers or NaN.
    """
    if not isinstance(num_shuffles, int) or num_shuffles < 2:
        raise ValueError(
            f"num_shuffles must be a whole number of at least 2, got {num_shuffles!r}: one shuffle has no spread."
        )
    if counts.ndim != 3 or not (counts >= 0).all():
        raise ValueError(
            "counts must be numbers that are not negative, of shape (heads, components, categories), got the shape "
            f"{tuple(counts.shape)}" + ("." if counts.ndim != 3 else " with negative numbers or NaN.")
        )
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
