# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Random calls of the operator in float64, their gradients, and how two results compare."""

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gma_hf.ops import gaussian_mixture_attention


# The same few examples in every run; no deadline, because a busy machine is not a failure.
few_examples = settings(derandomize=True, deadline=None, max_examples=15, database=None)

EPS = 1e-6
QKV = ("query", "key", "value")
MIXTURE = ("means", "raw_variances", "prior_logits")


@dataclass
class Problem:
    """Sizes and features of a call."""

    length: int = 20
    batch: int = 2
    key_heads: int = 1
    mixtures_per_key_head: int = 1
    queries_per_mixture: int = 1
    components: int = 5
    routing_dim: int = 4
    value_dim: int = 3
    causal: bool = True
    normalize: bool = True
    normalizer: bool = False  # also an output, where the read is normalised
    correlate: bool = False  # which is not normalised
    weights: bool = False
    decay: bool = False
    delta: bool = False  # the delta rule, of causal calls that are not normalised
    state: bool = False
    packed: bool = False
    states: bool = False  # of every packed sequence, and a spare one a row; with `state` and `packed`
    query_length: int | None = None
    seed: int = 0

    def __post_init__(self):
        self.delta = self.delta and self.causal
        self.normalize = self.normalize and not (self.correlate or self.delta)

    @property
    def mixtures(self) -> int:
        return self.key_heads * self.mixtures_per_key_head

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments in float64: some zero write weights, some total and some nearly total forgetting."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        batch, length, mixtures = self.batch, self.length, self.mixtures
        tensors = {
            "query": normal(batch, mixtures * self.queries_per_mixture, self.query_length or length, self.routing_dim),
            "key": normal(batch, self.key_heads, length, self.routing_dim),
            "value": normal(batch, self.key_heads, length, self.value_dim),
            "means": normal(mixtures, self.components, self.routing_dim),
            "raw_variances": normal(mixtures, self.components, self.routing_dim),
            "prior_logits": normal(mixtures, self.components),
        }
        if self.weights:
            tensors["write_weight"] = normal(batch, mixtures, length).relu()
        if self.decay:
            log_decay = -normal(batch, self.key_heads, length).exp() * 0.2
            log_decay[..., 3::17] = -torch.inf
            log_decay[..., 9::23] = -1e4
            tensors["log_decay"] = log_decay
        if self.delta:
            tensors["delta_strength"] = torch.rand(batch, mixtures, length, generator=generator, dtype=torch.float64)
        if self.state:
            rows = (batch, self.num_sequences() + 1) if self.states else (batch,)
            tensors["S"] = normal(*rows, mixtures, self.components, self.value_dim)
            tensors["z"] = normal(*rows, mixtures, self.components).abs()
        return tensors

    def num_sequences(self) -> int:
        """The most that a row has."""
        ids = Problem.sequence_ids(self)
        return 1 + int((ids[:, 1:] != ids[:, :-1]).sum(dim=1).max())

    def sequence_ids(self) -> Tensor | None:
        """Runs of random lengths; an id may come back later, which is another sequence."""
        if not self.packed:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        changes = torch.rand(self.batch, self.length, generator=generator) < 0.1
        return changes.cumsum(dim=-1) % 3

    def run(self, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
        """Output and, where there are, normaliser and final state."""
        tensors = dict(tensors)
        state = (tensors.pop("S"), tensors.pop("z")) if self.state else None
        with_state = self.causal or self.states or not self.packed
        with_normalizer = self.normalize and self.normalizer
        result = gaussian_mixture_attention(
            **tensors,
            causal=self.causal,
            normalize=self.normalize,
            sequence_ids=self.sequence_ids(),
            initial_state=state,
            output_final_state=with_state,
            output_normalizer=with_normalizer,
            correlate=self.correlate,
            eps=EPS,
            **options,
        )
        if not (with_state or with_normalizer):
            return {"output": result}
        named = {"output": result[0]}
        if with_normalizer:
            named["normalizer"] = result[1]
        if with_state:
            named["S"], named["z"] = result[-1]
        return named

    def results(self, dtype: torch.dtype = torch.float64, **options) -> dict[str, Tensor]:
        """Outputs, final state and the gradient of every input of a random linear function of them."""
        leaves = {name: x.to(dtype).requires_grad_() for name, x in self.tensors().items()}
        outputs = self.run(leaves, **options)
        generator = torch.Generator().manual_seed(self.seed + 1)
        loss = sum(
            (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
            for x in outputs.values()
        )
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves.values(), strict=True))
        return {name: x.detach() for name, x in outputs.items()} | {
            f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)
        }


def errors(expected: dict[str, Tensor], actual: dict[str, Tensor], floor: float = 1e-3) -> dict[str, float]:
    """Relative error of every result; the scale has a floor, since a gradient may vanish identically."""
    assert expected.keys() == actual.keys()
    return {
        name: ((actual[name].double() - expected[name]).norm() / expected[name].norm().clamp(min=floor)).item()
        for name in expected
    }


def assert_close(
    expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float, floor: float = 1e-3
) -> None:
    """Every result agrees to the relative tolerance; a NaN never does."""
    wrong = {name: error for name, error in errors(expected, actual, floor).items() if not error <= tolerance}
    assert not wrong, wrong


def problems(max_length: int = 150, allow_correlated: bool = True, **fixed) -> st.SearchStrategy[Problem]:
    """Calls of every kind: grouped heads, odd sizes, weights, decays, states, packing."""
    free = {
        "length": st.integers(1, max_length),
        "batch": st.integers(1, 2),
        "key_heads": st.integers(1, 2),
        "mixtures_per_key_head": st.integers(1, 2),
        "queries_per_mixture": st.integers(1, 2),
        "components": st.integers(1, 7),
        "routing_dim": st.integers(1, 5),
        "value_dim": st.integers(1, 6),
        "normalize": st.booleans(),
        "normalizer": st.booleans(),
        "weights": st.booleans(),
        "decay": st.booleans(),
        "delta": st.booleans(),
        "state": st.booleans(),
        "packed": st.booleans(),
        "seed": st.integers(0, 1000),
    }
    chosen = free | {name: st.just(value) for name, value in fixed.items()}
    # Routes correlate over two components or more
    correlated = {"correlate": st.just(True), "components": st.integers(2, 7)}
    plain = st.builds(Problem, **chosen)
    return st.one_of(plain, st.builds(Problem, **(chosen | correlated))) if allow_correlated else plain
