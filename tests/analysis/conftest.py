# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A small model with its tokenizer, a text, and a model whose components are known beforehand."""

import pytest
import torch
from torch import nn

from gma_hf import GMAForCausalLM
from gma_hf.modeling import GMAMixture
from gma_hf.training import train_tokenizer
from tests.conftest import make_model, tiny_config


TEXT = (
    "The river runs past 12 old mills, and the children gather stones.\n\n"
    "    In winter, Anna & Otto don't read_lines(path) <script>alert('$x$')</script>; they paid 3.50 for it!\n"
) * 6


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([TEXT], 320)


@pytest.fixture(scope="session")
def model(tokenizer):
    return make_model(GMAForCausalLM, tiny_config("gated", vocab_size=len(tokenizer)))


class OneMixture(nn.Module):
    """A model of one layer and one head that routes a table of points, one point per token id; the component of token i
    is `components[i]`, all but surely: means a distance of 20 standard deviations apart."""

    def __init__(self, components: list[int]):
        super().__init__()
        num_components = max(components) + 1
        points = 20.0 * torch.eye(num_components)
        self.embedding = nn.Embedding.from_pretrained(points[components])
        self.mixture_norm = GMAMixture(1, num_components, num_components, variance_floor=1e-4, eps=1e-6)
        self.mixture_norm.reset_parameters(mean_std=1.0, variance=1.0, balanced_priors=False)
        with torch.no_grad():
            self.mixture_norm.means.copy_(points)

    def forward(self, input_ids, attention_mask=None):
        states = self.embedding(input_ids).unsqueeze(1)
        weight = None if attention_mask is None else attention_mask[:, None].float()
        return self.mixture_norm(states, states, states, write_weight=weight)


@pytest.fixture
def one_mixture():
    return OneMixture
