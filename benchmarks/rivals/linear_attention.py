# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Linear attention with a fixed feature map phi, a rival of GMA in the benchmarks:

    o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)

over all j, or j <= i if causal, in time linear in the length. The feature maps are elu(x) + 1 (Katharopoulos et al., 2020,
arXiv:2006.16236) and the positive orthogonal random features of the Performer (Choromanski et al., 2021, arXiv:2009.14794).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import is_tracing

from gma_hf import GMAConfig
from gma_hf.cache_argument import takes_cache
from gma_hf.modeling.layout import Layout


CHUNK_SIZE = 128


def linear_attention(
    query_features: Tensor, key_features: Tensor, value: Tensor, causal: bool = True, eps: float = 1e-6
) -> Tensor:
    """
    The normalised read above. Products in the dtype of `value`, sums over tokens in float32 at least.

    Args:
        query_features: `[batch, heads, length, features]`, phi(q), not negative.
        key_features: the same of the keys; zero where a token is padding.
        value: `[batch, heads, length, dim]`.
        causal: whether token i sees j <= i only.
        eps: added to the normaliser.

    Returns:
        `[batch, heads, length, dim]`.
    """
    dtype = value.dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    query, key = query_features.to(dtype), key_features.to(dtype)
    with torch.autocast(value.device.type, enabled=False):
        if not causal:
            state = key.transpose(-1, -2) @ value
            normaliser = key.to(accumulator).sum(dim=-2, keepdim=True)
            denominator = (query.to(accumulator) * normaliser).sum(dim=-1, keepdim=True)
            return ((query @ state).to(accumulator) / (denominator + eps)).to(dtype)

        length = value.shape[2]
        # Zero keys at the end write nothing
        query, key, value = (
            F.pad(x, (0, 0, 0, -length % CHUNK_SIZE)).unflatten(2, (-1, CHUNK_SIZE)) for x in (query, key, value)
        )
        # Within a chunk by the matrix of scores, from earlier chunks by their state
        scores = (query @ key.transpose(-1, -2)).tril()
        state = _sum_of_earlier((key.transpose(-1, -2) @ value).to(accumulator))
        normaliser = _sum_of_earlier(key.to(accumulator).sum(dim=-2, keepdim=True))
        numerator = (scores @ value).to(accumulator) + (query @ state.to(dtype)).to(accumulator)
        denominator = scores.to(accumulator).sum(dim=-1, keepdim=True)
        denominator = denominator + (query.to(accumulator) * normaliser).sum(dim=-1, keepdim=True)
        return (numerator / (denominator + eps)).to(dtype).flatten(2, 3)[:, :, :length]


def _sum_of_earlier(x: Tensor) -> Tensor:
    """For every chunk, dimension 2 of `[batch, heads, chunks, ...]`, the sum over the chunks before it."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1].cumsum(dim=2)


class LinearAttention(nn.Module):
    """
    Projections to heads, feature map, normalised read, output projection; in the place of a block's GMA.

    Subclasses define `features`. Takes what GMA layers take but caches and packed sequences.
    """

    eps = 1e-6

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def features(self, x: Tensor, is_query: bool, mask: Tensor | None) -> Tensor:
        """phi of queries or keys `[batch, heads, length, head_dim]`; `mask` `[batch, 1, length, 1]` is true at real tokens."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw what is neither a linear map nor a norm."""

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        cache=None,
        layout: Layout | None = None,
        is_causal: bool = True,
        **kwargs,
    ) -> tuple[Tensor, None]:
        mask = padding_mask_of(layout, cache)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if mask is None else mask[:, None, :, None]
        key_features = self.features(key, False, mask)
        if mask is not None:
            key_features = key_features.masked_fill(~mask, 0)
        output = linear_attention(self.features(query, True, mask), key_features, value, is_causal, self.eps)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


class EluAttention(LinearAttention):
    """phi(x) = elu(x) + 1."""

    def features(self, x: Tensor, is_query: bool, mask: Tensor | None) -> Tensor:
        # elu(x) + 1 with less rounding: exp(x) is small where x is negative, and 1 + x is not
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class PerformerAttention(LinearAttention):
    """
    FAVOR+: phi(x) = exp(w.x - |x|^2 / 2) with x scaled by dim^(-1/4), whose products estimate the softmax kernel; the rows w
    of `projection` are orthogonal in blocks, as long as Gaussian vectors are. One projection for all heads of a layer, as
    many features as the configuration has components.

    Exponents are stabilised by their maximum, per token for queries and over all keys for keys, as in the original code:
    both cancel in the normalised read. That code also adds 1e-4 to the features. Here only the queries' get it: added to
    the keys' it would make the past depend, slightly, on the maximum over future keys.
    """

    eps = 1e-30

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.register_buffer("projection", torch.empty(config.num_components, config.head_dim))

    def reset_parameters(self) -> None:
        num_features, dim = self.projection.shape
        factors = torch.linalg.qr(torch.randn(-(-num_features // dim), dim, dim))
        # With the signs of R's diagonal the rotation is uniform; Q alone prefers some directions to their opposites
        rotations = factors.Q * factors.R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        directions = rotations.flatten(0, 1)[:num_features]
        self.projection.copy_(directions * torch.randn(num_features, dim).norm(dim=-1, keepdim=True))

    def features(self, x: Tensor, is_query: bool, mask: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
            exponents = x @ self.projection.to(x.dtype).T - 0.5 * x.square().sum(dim=-1, keepdim=True)
            if is_query:
                return (exponents - exponents.amax(dim=-1, keepdim=True).detach()).exp() + 1e-4
            if mask is not None:
                exponents = exponents.masked_fill(~mask, torch.finfo(x.dtype).min)
            return (exponents - exponents.amax(dim=(-2, -1), keepdim=True).detach()).exp()


def padding_mask_of(layout: Layout | None, cache=None) -> Tensor | None:
    """
    Where tokens are real, `(batch, length)`, or `None` if all are. The rivals are there to be trained and evaluated on whole
    sequences, with padding at their ends.

    Args:
        layout ([`Layout`], *optional*): what a GMA model tells its layers of the tokens.
        cache (`Cache`, *optional*): must be `None`.

    Raises:
        ValueError: for a cache, packed sequences, or padding between real tokens.
    """
    if cache is not None or (layout is not None and layout.sequence_ids is not None):
        raise ValueError(
            "The rival mixers know neither caches nor packed sequences: use whole sequences, use_cache=False."
        )
    if layout is None or layout.padding_mask is None:
        return None
    # A graph that is being traced has no values to look at
    if layout.has_gaps and not is_tracing(layout.padding_mask):
        raise ValueError(
            "The attention mask has padding between real tokens, which convolutions and positions of the rival mixers would "
            "count as tokens: pad at the ends of the sequences."
        )
    return layout.padding_mask
