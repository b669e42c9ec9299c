# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What a layer keeps between calls: of the tokens, a [`MemoryState`]; of its parameters, [`KeptValues`]."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import is_tracing

from ..compat import version_of


class MemoryState(NamedTuple):
    """
    What a layer remembers between calls. Its size does not depend on how many tokens were seen.

    With a window, its last W tokens are not in S and z yet, and the first s, the sink tokens, never will be: they have a place of
    their own when they have left the window. Rows with fewer tokens are filled from the left with invalid ones.
    """

    state: Tensor  # S [batch, heads, components, value_dim], in float32
    normalizer: Tensor  # z [batch, heads, components], in float32
    keys: Tensor | None = None  # [batch, key_value_heads, W, head_dim]
    values: Tensor | None = None  # [batch, key_value_heads, W, value_dim]
    valid: Tensor | None = (
        None  # [batch, W], True at the tokens that exist; None if all W and all s are known to exist
    )
    routing_keys: Tensor | None = None  # [batch, key_value_heads, W, routing_dim], where they are not the keys
    write_weight: Tensor | None = None  # [batch, h, W], of the tokens still to be written
    log_decay: Tensor | None = None  # [batch, h, W]
    sink_keys: Tensor | None = None  # [batch, key_value_heads, s, head_dim]
    sink_values: Tensor | None = None  # [batch, key_value_heads, s, value_dim]
    sink_valid: Tensor | None = None  # [batch, s]; None where `valid` is
    # [batch], how many tokens are in S and z; if it was not kept, b must be 0. Where all rows are known to have as many, a plain
    # number: how many tokens have left the window and the sinks, below zero while there is room
    count: Tensor | int | None = None
    convolution: Tensor | None = None  # [batch, kernel_size - 1, channels], the last inputs of the short convolution

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        """The same with `function` of every tensor."""
        return MemoryState(*(function(x) if isinstance(x, Tensor) else x for x in self))


class KeptValues:
    """
    What depends on parameters alone, computed once and kept as long as they do not change: beside the state of a layer in a
    cache, so that nothing outlives a text, and no two threads share it.
    """

    def __init__(self):
        self._values = {}

    def get(self, name: str, parameters: tuple[nn.Parameter, ...], compute: Callable[..., tuple[Tensor, ...]]):
        """`compute(*parameters)`, or what it was last time. Under autograd, and in compiled graphs, it is always computed."""
        if torch.is_grad_enabled() or is_tracing():
            return compute(*parameters)
        stamp = []
        for parameter in parameters:
            # Parameters of other classes (quantized, sharded, of a function transform) may change unseen
            if type(parameter) is not nn.Parameter or parameter.is_inference():
                return compute(*parameters)
            stamp += [version_of(parameter), parameter.data_ptr(), parameter.dtype]
        known = self._values.get(name)
        if known is None or known[1] != stamp or any(x is not y for x, y in zip(known[0], parameters, strict=True)):
            known = self._values[name] = parameters, stamp, compute(*parameters)
        return known[2]

    @property
    def names(self) -> list[str]:
        """What is kept."""
        return list(self._values)

    def __deepcopy__(self, copied: dict) -> "KeptValues":
        return KeptValues()

    def __reduce__(self):
        return KeptValues, ()
