# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Problems for the window's softmax: everything that it can be given, and what it makes of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gma_hf.ops.window.functional import SinkTokens, window_softmax
from tests.ops.kernels import DEVICE


@dataclass
class WindowProblem:
    """Random inputs of `window_softmax`, and what it makes of them."""

    length: int
    size: int
    causal: bool = True
    batch: int = 1
    key_heads: int = 2
    repeats: int = 2
    dim: int = 12
    value_dim: int = 20
    padded: bool = False
    packed: bool = False
    sinks: bool = False
    num_sink_tokens: int = 0
    leading: bool = False  # the sink tokens are the first of the keys
    weighing: bool = False  # the memory is weighed by other queries
    softcap: float | None = None
    # No token before the first, none that does not exist, and a memory that only later queries have
    whole: bool = False

    @property
    def lead(self) -> int:
        """How many keys stand before that of the first query."""
        return self.size if self.causal and not self.whole else 0

    @property
    def unasked(self) -> int:
        """How many queries have no memory."""
        return min(self.size, self.length - 1) if self.whole else 0

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        heads, keys, asked = self.key_heads * self.repeats, self.length + self.lead, self.length - self.unasked

        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        log_weight = math.log(3) + draw(self.batch, heads, asked)
        tensors = {
            "query": 2 * draw(self.batch, heads, self.length, self.dim),
            "key": draw(self.batch, self.key_heads, keys, self.dim),
            "value": draw(self.batch, self.key_heads, keys, self.value_dim),
            "read": draw(self.batch, heads, asked, self.value_dim),
            "log_weight": log_weight,
            "memory_bias": draw(heads),
            "memory_query": 0.3 * draw(heads, self.dim),
        }
        # What nothing was written to, and what was forgotten
        untold = min(self.size, asked // 2)
        tensors["log_weight"][:, :, :untold] = -torch.inf
        tensors["log_weight"][:, :, 1:untold:2] = -44.0
        if self.weighing:
            tensors["weighing_query"] = 2 * draw(self.batch, heads, self.length, self.dim)
        if self.sinks:
            tensors["sinks"] = draw(heads)
        if self.num_sink_tokens > 0 and not self.leading:
            num_sinks = 3 * self.num_sink_tokens if self.packed else self.num_sink_tokens
            tensors["sink_key"] = draw(self.batch, self.key_heads, num_sinks, self.dim)
            tensors["sink_value"] = draw(self.batch, self.key_heads, num_sinks, self.value_dim)
        return tensors

    def sink_tokens(self, key: Tensor, value: Tensor) -> SinkTokens:
        """What the queries behind the first five see; packed, of three sequences."""
        place, rank = torch.arange(5, self.length), torch.arange(self.num_sink_tokens)
        index = (place * 3 // self.length)[:, None] * self.num_sink_tokens + rank
        index = index.expand(self.batch, -1, -1).to(DEVICE) if self.packed else None
        visible = (rank < place[:, None] - 5)[None].to(DEVICE)
        return SinkTokens(key, value, visible, index)

    def masks(self) -> dict[str, Tensor | None]:
        """Which tokens there are, and runs of them."""
        place = torch.arange(self.length + self.lead)
        valid = (place >= self.lead)[None]
        if self.padded:
            rows = torch.arange(self.batch)[:, None]
            valid = valid & (place % 5 != rows) & (place % 23 < 17)
        runs = (place // 9 + place // 40).expand(self.batch, -1) if self.packed else None
        masks = {"valid": None if self.whole else valid, "runs": runs}
        return {name: None if x is None else x.to(DEVICE) for name, x in masks.items()}

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        tensors = dict(tensors)
        if self.leading:
            tensors["num_sinks"] = self.num_sink_tokens
        elif self.num_sink_tokens > 0:
            tensors["sink_tokens"] = self.sink_tokens(tensors.pop("sink_key"), tensors.pop("sink_value"))
        return window_softmax(
            **tensors, **self.masks(), size=self.size, causal=self.causal, scaling=0.4, softcap=self.softcap
        )

    def results(self, dtype: torch.dtype, change=lambda x: x) -> dict[str, Tensor]:
        """The output, and the gradient of everything."""
        leaves = {name: change(x.to(dtype).to(DEVICE)).detach().requires_grad_() for name, x in self.tensors().items()}
        output = self.run(leaves)
        # In an order of its own, as what follows an attention may ask for
        weights = torch.randn(output.mT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (output * weights.mT.to(output)).sum().backward()
        results = {"output": output.detach(), **{f"grad {name}": x.grad for name, x in leaves.items()}}
        return {name: x.cpu().to(torch.promote_types(dtype, torch.float32)) for name, x in results.items()}


class KeysApart(WindowProblem):
    """The first keys given as sink tokens, to be seen where they have left the window."""

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        place, rank = torch.arange(self.length, device=DEVICE), torch.arange(self.num_sink_tokens, device=DEVICE)
        keys, values = (tensors[name][:, :, : self.num_sink_tokens] for name in ("key", "value"))
        sink_tokens = SinkTokens(keys, values, (place[:, None] - rank >= self.size)[None])
        options = {"size": self.size, "causal": True, "scaling": 0.4, "softcap": self.softcap}
        return window_softmax(**tensors, **self.masks(), sink_tokens=sink_tokens, **options)
