# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Linformer (Wang et al., 2020, arXiv:2006.04768), for encoders: softmax attention over keys and values that learned maps of the
positions shorten to a fixed number."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import is_tracing

from benchmarks.rivals.linear_attention import padding_mask_of
from gma_hf import GMAConfig
from gma_hf.cache_argument import takes_cache
from gma_hf.modeling.layout import Layout


class LinformerAttention(nn.Module):
    """
    o = softmax(q (E k)^T / sqrt(d)) E v, in the place of a block's GMA. E, `[num_components, positions]`, serves the keys and the
    values of all heads of a layer (the paper's key-value sharing); it ends at `max_position_embeddings`.
    """

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(config.hidden_size, width, bias=config.attention_bias) for _ in range(3)
        )
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.shorten = nn.Parameter(torch.empty(config.num_components, config.max_position_embeddings))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.shorten.normal_(std=self.shorten.shape[0] ** -0.5)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        cache=None,
        layout: Layout | None = None,
        is_causal: bool = False,
        **kwargs,
    ) -> tuple[Tensor, None]:
        mask = padding_mask_of(layout, cache)
        if is_causal:
            raise ValueError("Linformer mixes all positions: use it in encoders (`is_causal=False`).")
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        shorten = self.shorten[:, : hidden_states.shape[1]].to(key.dtype)
        if mask is not None:
            if not is_tracing(mask) and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise ValueError(
                    "Padding stands to the left of tokens, but Linformer maps positions in the row: pad on the right."
                )
            real = mask[:, None, :, None].to(key.dtype)
            key, value = key * real, value * real
        output = F.scaled_dot_product_attention(query, shorten @ key, shorten @ value)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None
