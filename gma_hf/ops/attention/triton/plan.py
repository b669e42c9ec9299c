# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The block sizes and launch options of the kernels: a table by component count and dimension, never by length."""

import functools
import os
from typing import NamedTuple

import torch
import triton


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Plan(NamedTuple):
    """Block sizes of the kernels, and their launch options."""

    exact: bool  # float32 operands instead of 16-bit ones
    T: int  # tokens of a chunk
    CP: int  # components, padded
    DP: int  # routing dimensions, padded
    BD: int  # routing dimensions of a block
    rows: int  # tokens of a tile whose responsibilities are computed, and routing dimensions of a block of it
    BR: int
    BC: int  # components of a block of a state
    BV: int  # value dimensions of a block
    NV: int  # blocks of value dimensions
    fused: bool  # the forward pass keeps responsibilities on the chip
    responsibilities: dict[str, int]  # launch options
    fused_launch: dict[str, int]
    states: dict[str, int]
    read: dict[str, int]
    gradient: dict[str, int]
    logits: dict[str, int]

    @property
    def DVP(self) -> int:
        """Value dimensions, padded."""
        return self.BV * self.NV

    @property
    def state_size(self) -> int:
        """Numbers of S and z of one mixture."""
        return self.CP * (self.DVP + 1)

    @property
    def gamma_dtype(self) -> torch.dtype:
        """The dtype of responsibilities and states of chunks in memory."""
        return torch.float32 if self.exact else torch.float16


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded(size: int) -> int:
    """The next power of two, at least 16: what matrix units multiply."""
    return max(16, triton.next_power_of_2(size))


PRECISION = "ieee" if INTERPRETED else "tf32x3"  # of products of float32 operands


@functools.cache
def make_plan(dtype: torch.dtype, components: int, dim: int, value_dim: int, repeats: int) -> Plan:
    """The plan of a call with `repeats` query heads per mixture."""
    exact = dtype != torch.bfloat16
    CP, DP, DVP = padded(components), padded(dim), padded(value_dim)
    # Fewer than 64 rows keep the large matrix instructions away; float32 operands leave no room for more
    T = 64 if not exact else 32 if CP * max(DP, DVP) <= 4096 else 16
    BD = min(DP, 4096 // CP if exact else 64)
    # The coefficients of a mixture are kept on the chip where they fit
    rows, BR = (T, BD) if exact else (128 if CP > 64 else 64, min(DP, 16384 // CP, 128))
    BC = min(CP, 64 if exact else 128)
    # Query heads that share keys share a block of all value dimensions
    BV = DVP if repeats > 1 else min(DVP, 64)
    small = not exact and CP * max(DP, DVP) <= 4096
    # One program of the fused kernels has all value dimensions: several blocks of them would leave all but the first unwritten
    fused = CP * max(DP, DVP) <= 4096 and BV == DVP
    many = 8 if CP * max(BD, BV) > 4096 else 4
    return Plan(
        exact, T, CP, DP, BD, rows, BR, BC, BV, cdiv(DVP, BV), fused,
        responsibilities={"num_warps": 8 if CP > 64 and not exact else 4, "num_stages": 3 if small else 2},
        fused_launch={"num_warps": 4, "num_stages": 2},
        states={"num_warps": 8 if BC * BV > 8192 else 4, "num_stages": 2 if exact else 3},
        read={"num_warps": many, "num_stages": 1},
        gradient={"num_warps": many, "num_stages": 1},
        logits={"num_warps": 8 if CP * BD > 4096 else 4, "num_stages": 3 if small else 2},
    )  # fmt: skip


@functools.cache
def multiprocessors(device_index: int | None) -> int:
    """Streaming multiprocessors of the GPU; 4 in the interpreter of Triton, so that small problems take both ways."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device_index).multi_processor_count


def segment_length(plan: Plan, sequences: int, chunks: int, device: torch.device) -> int:
    """Chunks per segment: all chunks if sequences and heads fill the chip, because one pass is then enough."""
    programs = sequences * plan.NV * cdiv(plan.CP, plan.BC)
    if 2 * programs >= 3 * multiprocessors(device.index):
        return chunks
    wanted = max(1, min(32, programs * chunks // (8 * multiprocessors(device.index))))
    segments = max(1, chunks // wanted)
    return cdiv(chunks, segments)


def workers_per_mixture(plan: Plan, mixtures: int, tiles: int, device: torch.device) -> int:
    """
    Programs that share the tiles of the queries or keys of a mixture: as many as run at once, so that there are few partial
    sums.
    """
    slots = multiprocessors(device.index)  # of 2, for either side
    workers = max(1, min(tiles, slots // (mixtures * (plan.DP // plan.BD))))
    return cdiv(tiles, cdiv(tiles, workers))
