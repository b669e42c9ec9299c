# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Problems for a softmax window in front of a mixture, and its equations with all pairs of tokens written out."""

import itertools
from types import SimpleNamespace

import torch

from gma_hf.modeling import GMAMemory, GMAMixture, GMAWindow, Layout


# Sums of a few hundred float64 terms of order one, in two orders
EXACT = {"rtol": 1e-9, "atol": 1e-11}
BATCH, KEY_HEADS, HEAD_DIM, VALUE_DIM, COMPONENTS = 2, 2, 4, 3, 5


def problem(
    window: int,
    length: int,
    repeats: int = 2,
    decay: bool = True,
    weight: bool = True,
    seed: int = 0,
    num_sinks: int = 0,
):
    """A mixture and a window with random parameters, and random inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = KEY_HEADS * repeats

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mixture = GMAMixture(heads, COMPONENTS, HEAD_DIM, variance_floor=1e-4, eps=1e-6).double()
    window = GMAWindow(heads, HEAD_DIM, window, num_sinks).double()
    with torch.no_grad():
        for parameter in (*mixture.parameters(), *window.parameters()):
            parameter.copy_(draw(*parameter.shape))
    tokens = {
        "query": draw(BATCH, heads, length, HEAD_DIM),
        "key": draw(BATCH, KEY_HEADS, length, HEAD_DIM),
        "value": draw(BATCH, KEY_HEADS, length, VALUE_DIM),
        "write_weight": draw(BATCH, heads, length).exp() if weight else None,
        "log_decay": -0.3 * draw(BATCH, heads, length).exp() if decay else None,
    }
    return SimpleNamespace(mixture=mixture, window=window, tokens=tokens)


def attend(p, tokens: dict | None = None, **arguments):
    tokens = p.tokens if tokens is None else tokens
    """The output, with `output_history` also what is to be remembered."""
    output, _, history = GMAMemory()(p.mixture, p.window, scaling=HEAD_DIM**-0.5, **tokens, **with_layout(arguments))
    return (output, history) if arguments.get("output_history") else output


def implied(p, **arguments) -> torch.Tensor:
    """The matrix that the attention implies."""
    return GMAMemory().affinity(p.mixture, p.window, scaling=HEAD_DIM**-0.5, **with_layout(arguments))


def with_layout(arguments: dict) -> dict:
    """`padding_mask` and `sequence_ids` as a layout."""
    arguments = dict(arguments)
    layout = Layout(BATCH, 0, arguments.pop("padding_mask", None), arguments.pop("sequence_ids", None))
    some = next((x for x in (layout.padding_mask, layout.sequence_ids) if x is not None), None)
    if some is not None:
        arguments["layout"] = Layout(*some.shape, layout.padding_mask, layout.sequence_ids)
    return arguments


def reference(
    p, causal: bool = True, softcap: float | None = None, sinks=None, routing_query=None, routing_key=None
) -> torch.Tensor:
    """The equations of `window.py`, with all pairs of tokens written out."""
    query, key, value = p.tokens["query"], p.tokens["key"], p.tokens["value"]
    heads, length, size = query.shape[1], query.shape[2], p.window.window_size
    key, value = (x.repeat_interleave(heads // KEY_HEADS, dim=1) for x in (key, value))
    routing_key = key if routing_key is None else routing_key.repeat_interleave(heads // KEY_HEADS, dim=1)
    routing_query = query if routing_query is None else routing_query
    logits = HEAD_DIM**-0.5 * query @ key.transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    near = (distance >= 0) & (distance < size) if causal else distance.abs() <= size
    is_first = torch.arange(length) < (p.window.num_sink_tokens if causal else 0)
    near = near | (is_first & (distance >= size))
    in_memory = (distance >= size) & ~is_first if causal else torch.ones_like(near)

    far = p.mixture.responsibilities(routing_query) @ p.mixture.responsibilities(routing_key).transpose(-1, -2)
    if p.tokens["write_weight"] is not None:
        far = far * p.tokens["write_weight"][:, :, None]
    far = far * in_memory
    if p.tokens["log_decay"] is not None and causal:
        # What j wrote is forgotten by the tokens l with j < l <= i - W
        for i, j in itertools.product(range(length), repeat=2):
            if i - j >= size:
                far[:, :, i, j] *= p.tokens["log_decay"][:, :, j + 1 : i - size + 1].sum(-1).exp()
    growth = 1 + in_memory.sum(dim=-1).double() / size
    bias = p.window.memory_bias[:, None] + torch.einsum("bhnd,hd->bhn", query, p.window.memory_query)
    memory = bias.exp() * growth ** -p.window.memory_dilution[:, None]
    weights = logits.exp() * near + memory[..., None] * far
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return weights @ value / total


def rows(tokens: dict, row: int, keep: torch.Tensor) -> dict:
    """The tokens `keep` of one row."""
    dims = {"write_weight": 2, "log_decay": 2}
    index = keep.nonzero()[:, 0]
    return {
        name: None if x is None else x[row : row + 1].index_select(dims.get(name, 2), index)
        for name, x in tokens.items()
    }


def part(tokens: dict, start: int, stop: int) -> dict:
    return {name: None if x is None else x[:, :, start:stop] for name, x in tokens.items()}


def goes_on(ids: torch.Tensor, mask: torch.Tensor, bound: int) -> bool:
    """Whether the real tokens on both sides of a bound are of one sequence."""
    before, after = ids[:bound][mask[:bound]], ids[bound:][mask[bound:]]
    return before.numel() == 0 or after.numel() == 0 or bool(before[-1] == after[0])
