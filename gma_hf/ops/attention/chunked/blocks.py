# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""How the chunked backend walks along the length.

Up to BLOCK tokens are processed at once, which bounds the temporary memory; a block holds n chunks of T tokens. Inside,
the mixtures lead, so that one matrix product per mixture sees the tokens of the whole batch, and the R query heads that
share a mixture are rows beside each other: queries [M, B, n, R * T, dim], keys and values [M, B, n, T, dim].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..mixture import centred, unwritten_as_zero


CHUNK = 64  # tokens: with about as many as components, pair weights and states cost the same
BLOCK = 512  # tokens: enough to fill the matrix products, few enough for a CPU's cache


class Block(NamedTuple):
    """The tokens from `start` to `stop`, in chunks of `chunk` tokens."""

    start: int
    stop: int
    chunk: int

    def of(self, x: Tensor) -> Tensor:
        """The block's part of [batch, heads, length, ...] as a view [heads, batch, n, T, ...]."""
        x = x[:, :, self.start : self.stop].transpose(0, 1)
        return x.unflatten(2, ((self.stop - self.start) // self.chunk, self.chunk))

    def of_queries(self, x: Tensor, mixtures: int) -> Tensor:
        """The block's part of [batch, query_heads, length, dim] as a view [mixtures, batch, n, R, T, dim]."""
        return self.of(x).unflatten(0, (mixtures, x.shape[1] // mixtures)).permute(0, 2, 3, 1, 4, 5)

    def of_keys(self, x: Tensor, mixtures: int, write_weight: Tensor | None) -> Tensor:
        """
        The part of the block in [batch, key_value_heads, length, dim], as [mixtures, batch, n, T, dim]. Keys with the write
        weight 0 ([1 or mixtures, batch, n, T]) are padding, and hold no NaN afterwards.
        """
        x = self.of(x)
        x = x if x.shape[0] == mixtures else x.repeat_interleave(mixtures // x.shape[0], dim=0)
        return unwritten_as_zero(x, write_weight)

    def centred_queries(self, x: Tensor, centre: Tensor) -> Tensor:
        """Queries minus the centres of the mixtures [mixtures, 1, routing_dim]: [mixtures, batch, n, R * T, routing_dim]."""
        x = centred(self.of_queries(x, centre.shape[0]), centre[:, None, None, None])
        return x.flatten(3, 4).contiguous()

    def centred_keys(self, x: Tensor, centre: Tensor, write_weight: Tensor | None) -> Tensor:
        """Keys minus the centres of the mixtures [mixtures, 1, routing_dim]: [mixtures, batch, n, T, routing_dim]."""
        return centred(self.of_keys(x, centre.shape[0], write_weight), centre[:, None, None]).contiguous()

    def put_queries(self, into: Tensor, x: Tensor) -> None:
        """Write x [mixtures, batch, n, R * T, dim] to its place in [batch, query_heads, length, dim]."""
        into = self.of_queries(into, x.shape[0])
        into.copy_(x.unflatten(3, into.shape[3:5]))

    def put_keys(self, into: Tensor, x: Tensor) -> None:
        """Write x [mixtures, batch, n, T, ...] to its place in [batch, heads, length, ...], summed over shared heads."""
        into = self.of(into)
        if into.shape[0] != x.shape[0]:
            x = x.unflatten(0, (into.shape[0], -1)).sum(dim=1)
        into.copy_(x)


def causal_blocks(length: int) -> list[Block]:
    """Blocks of whole chunks. The remaining tokens form a block of one shorter chunk."""
    whole = length - length % CHUNK
    cover = [Block(start, min(start + BLOCK, whole), CHUNK) for start in range(0, whole, BLOCK)]
    return cover if whole == length else [*cover, Block(whole, length, length - whole)]


def state_slots(length: int) -> int:
    """
    The number of states before every block of `causal_blocks` and after the last block. For some lengths it is one too many,
    because a compiler must be able to bound it for a symbolic length.
    """
    return -(-length // BLOCK) + 2


def single_chunk_blocks(length: int) -> list[Block]:
    """Blocks of one chunk each, for bidirectional calls, which have no order."""
    return [Block(start, min(start + BLOCK, length), min(BLOCK, length - start)) for start in range(0, length, BLOCK)]


def add_product_(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x += left @ right for contiguous x and equal batch dimensions, without a temporary for the product."""
    x.flatten(0, -3).baddbmm_(left.flatten(0, -3), right.flatten(0, -3))
    return x


def contiguous_clone(x: Tensor) -> Tensor:
    """A contiguous copy, even of a contiguous tensor, because outputs must not share memory with inputs."""
    return x.clone(memory_format=torch.contiguous_format)


def empty_reads(query: Tensor, S: Tensor, dtype: torch.dtype, output_normalizer: bool) -> tuple[Tensor, Tensor]:
    """Memory for the output [B, Hq, N, dv] and for D [B, Hq, N], which has size 0 unless it is requested."""
    shape = query.shape[:3]
    return query.new_empty(*shape, S.shape[-1], dtype=dtype), S.new_empty(shape if output_normalizer else 0)
