# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Tensor parallelism by heads. A mixture, a window and the gates belong to whole heads. So every rank loads the parameters of
its own heads, and returns its part of the sum of the output projection.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..modeling.short_convolution import GMAShortConvolution


# Linear maps whose inputs are spread over the ranks; everything else is spread by its outputs, its first dimension
SUMMED = ("o_proj", "down_proj")
# Norms know nothing of heads
WHOLE = ("input_layernorm", "post_attention_layernorm", "o_norm", "norm", "q_norm", "k_norm")


def shard_weights(layers: nn.Module, rank: int, num_ranks: int) -> None:
    """
    Set, for every parameter of the blocks, which part of the checkpoint it gets, with the attribute `weight_loader` that
    vLLM reads.

    Args:
        layers (`nn.Module`): the blocks, built with `1 / num_ranks` of the heads.
        rank (`int`), num_ranks (`int`): the part.
    """
    for module_name, module in layers.named_modules():
        kind = module_name.rsplit(".", 1)[-1]
        for name, parameter in module.named_parameters(recurse=False):
            if num_ranks == 1 or kind in WHOLE:
                part = whole
            elif kind in SUMMED:
                part = partial(inputs_of_rank if name == "weight" else once, rank=rank, num_ranks=num_ranks)
            elif isinstance(module, GMAShortConvolution):
                sizes = tuple(layers.get_submodule(module_name.rpartition(".")[0]).projection_sizes)
                part = partial(projections_of_rank, rank=rank, num_ranks=num_ranks, sizes=sizes)
            else:
                part = partial(outputs_of_rank, rank=rank, num_ranks=num_ranks)
            parameter.weight_loader = partial(load_part, part)


def load_part(part, parameter: Tensor, loaded: Tensor) -> None:
    """
    Copy a part of a loaded tensor into a parameter.

    Raises:
        ValueError: if the shapes differ.
    """
    loaded = part(loaded)
    if loaded.shape != parameter.shape:
        raise ValueError(
            f"The checkpoint holds a tensor whose part for this process has shape {tuple(loaded.shape)}, but the "
            f"configuration needs {tuple(parameter.shape)}. Do config.json and the weights belong together?"
        )
    with torch.no_grad():
        parameter.copy_(loaded)


def whole(loaded: Tensor) -> Tensor:
    return loaded


def outputs_of_rank(loaded: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Equal parts of the first dimension."""
    return loaded.chunk(num_ranks)[rank]


def inputs_of_rank(loaded: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Equal parts of the second dimension."""
    return loaded.chunk(num_ranks, dim=1)[rank]


def once(loaded: Tensor, rank: int, num_ranks: int) -> Tensor:
    """The bias of a sum over ranks. Only one rank adds it."""
    return loaded if rank == 0 else torch.zeros_like(loaded)


def projections_of_rank(loaded: Tensor, rank: int, num_ranks: int, sizes: tuple[int, ...]) -> Tensor:
    """Queries, keys and values lie one behind the other; `sizes` are those of one rank."""
    parts = loaded.split([size * num_ranks for size in sizes])
    return torch.cat([part.split(size)[rank] for part, size in zip(parts, sizes, strict=True)])
