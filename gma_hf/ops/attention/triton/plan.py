# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Which block sizes and launch options the kernels run with: a table by component count and dimension, never by length."""

import functools
import os
from typing import NamedTuple

import torch
import triton


class Plan(NamedTuple):
    """Sizes of the blocks that a kernel works on, and its launch options."""

    exact: bool  # float32 operands instead of 16-bit ones
    T: int  # tokens of a chunk
    CP: int  # components, padded
    DP: int  # routing dimensions, padded
    BD: int  # routing dimensions of a block
    BV: int  # value dimensions of a block
    NV: int  # blocks of value dimensions
    write: dict[str, int]
    read: dict[str, int]
    gradient: dict[str, int]

    def constants(self, dim: int, value_dim: int) -> dict[str, int | bool | str]:
        """What all large kernels are specialised for."""
        return {
            "T": self.T,
            "CP": self.CP,
            "DP": self.DP,
            "BD": self.BD,
            "BV": self.BV,
            "NV": self.NV,
            "EVEN_D": dim == self.DP,
            "EVEN_V": value_dim == self.BV * self.NV,
            "EXACT": self.exact,
            "PRECISION": "ieee" if INTERPRETED else "tf32x3",
        }


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded(size: int) -> int:
    """The next power of two, at least 16: what matrix units multiply."""
    return max(16, triton.next_power_of_2(size))


@functools.cache
def make_plan(dtype: torch.dtype, components: int, dim: int, value_dim: int) -> Plan:
    """The plan of a call."""
    exact = dtype != torch.bfloat16
    CP, DP, DVP = padded(components), padded(dim), padded(value_dim)
    many = CP > 128
    # Elements of a block that stays on the chip: all of a common size, a part of a large one
    room = 8192 if not exact and (many or CP * max(DP, DVP) <= 8192) else 4096
    BD, BV = min(DP, room // CP), min(DVP, room // CP)
    large = CP * max(BD, BV) > 4096
    stages = 1 if DP > BD else 2  # blocks that are loaded again and again leave no room for the next chunk
    # Fewer than 64 rows keep the large matrix instructions away; float32 operands leave no room for more
    T = 64 if not exact else 32 if CP * max(DP, DVP) <= 4096 else 16
    return Plan(
        exact,
        T,
        CP,
        DP,
        BD,
        BV,
        cdiv(value_dim, BV),
        write={"num_warps": 4, "num_stages": stages},
        read={"num_warps": 8 if large else 4, "num_stages": 1 if large else stages},
        gradient={"num_warps": 8 if many and not exact else 4, "num_stages": 1},
    )


@functools.cache
def multiprocessors(device_index: int | None) -> int:
    """Streaming multiprocessors of the GPU; 4 in Triton's interpreter, so that small problems take either way."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device_index).multi_processor_count


def fills_chip(plan: Plan, sequences: int, device: torch.device) -> bool:
    """Whether every sequence can be one segment: then nothing has to be computed twice."""
    return 2 * sequences * plan.NV >= 3 * multiprocessors(device.index)


def segment_length(plan: Plan, sequences: int, chunks: int, device: torch.device) -> int:
    """Chunks of a segment: many, because every segment costs a state, but enough segments to fill the chip; all alike."""
    programs = 8 * multiprocessors(device.index)
    wanted = max(1, min(32, sequences * plan.NV * chunks // programs))
    segments = max(1, chunks // wanted)
    return cdiv(chunks, segments)


def workers_per_mixture(plan: Plan, mixtures: int, segments: int, device: torch.device) -> int:
    """Programs that share the segments of a mixture evenly: as many as run at once, so that few partial sums remain."""
    slots = 2 * multiprocessors(device.index)
    workers = max(1, min(segments, slots // (mixtures * plan.NV)))
    return cdiv(segments, cdiv(segments, workers))
