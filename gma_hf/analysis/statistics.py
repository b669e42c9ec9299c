# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Statistics of the routes of a text of any length, added up batch by batch: no responsibilities are kept.

For a head with responsibilities gamma_c(x_t) of the real tokens t = 1..N (padding does not count):

    usage_c          = 1/N sum_t gamma_c(x_t)                     sums to 1 over the components
    usage perplexity = exp(-sum_c usage_c log usage_c)            from 1 (one component takes all) to C (all alike)
    entropy          = 1/N sum_t -sum_c gamma_c log gamma_c       in nats, from 0 (hard routing) to log C (none)
    dead             : usage_c < 1 / (10 C)                       a tenth of an equal share
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .collection import MixtureCall, run, watch_mixtures
from .routing import MARGIN_CAP, Routing, route
from .text import TokenBatch


DEAD_SHARE = 0.1  # of an equal share 1 / C
NUM_MARGIN_BINS = 64
# Bins widen towards large margins, because the number of tokens close to 0 matters most
MARGIN_EDGES = MARGIN_CAP * torch.linspace(0, 1, NUM_MARGIN_BINS + 1, dtype=torch.float64).square()


def effective_number(usage: Tensor) -> Tensor:
    """Usage perplexity `(heads,)`: how many components are in use, from their shares `(heads, components)`."""
    return torch.special.entr(usage).sum(dim=-1).exp()


def is_dead(usage: Tensor) -> Tensor:
    """`(heads, components)`, `True` where a component gets less than a tenth of an equal share."""
    return usage < DEAD_SHARE / usage.shape[-1]


class RoutingStatistics:
    """
    Running sums over the queries, or the keys, of one layer, and the statistics of these sums. All tensors are on the CPU.

    Args:
        num_categories (`int`, *optional*, defaults to `0`): number of token categories; 0 for none.
        num_token_types (`int`, *optional*, defaults to `0`): number of tracked token types; 0 for none.
    """

    def __init__(self, num_categories: int = 0, num_token_types: int = 0):
        self.num_categories = num_categories
        self.num_token_types = num_token_types
        self.num_tokens = 0
        self._sums: dict[str, Tensor] = {}
        self.stability_bound_max = torch.tensor(0.0)  # [heads]

    def add(
        self, routing: Routing, real: Tensor, categories: Tensor | None = None, token_types: Tensor | None = None
    ) -> None:
        """
        Add the tokens of a batch.

        Args:
            routing ([`Routing`]): the routes of the tokens, from [`route`].
            real (`torch.BoolTensor` of shape `(batch, length)`): `True` at tokens that are not padding.
            categories (`torch.Tensor` of shape `(batch, length)`, *optional*): indices of categories. Needed if
                `num_categories` is not 0.
            token_types (`torch.Tensor` of shape `(batch, length)`, *optional*): indices of token types, negative for tokens
                that are not tracked. Needed if `num_token_types` is not 0.
        """
        real = real.to(routing.margins.device)
        # [tokens, heads, ...] of the real tokens of all rows
        gamma, margins, bounds, sensitivities = (part.transpose(1, 2)[real] for part in routing)
        num_tokens, num_heads, num_components = gamma.shape
        if num_tokens == 0:
            return
        self.num_tokens += num_tokens
        self._accumulate("usage", gamma.sum(dim=0))
        self._accumulate("entropy", torch.special.entr(gamma).sum(dim=(0, 2)))
        self._accumulate("margin", margins.sum(dim=0))
        self._accumulate("stability_bound", bounds.sum(dim=0))
        self._accumulate("sensitivity", sensitivities.sum(dim=0))
        self.stability_bound_max = torch.maximum(self.stability_bound_max, bounds.amax(dim=0).cpu().double())

        head = torch.arange(num_heads, device=gamma.device)
        edges = MARGIN_EDGES[1:-1].to(margins)
        bins = torch.bucketize(margins.contiguous(), edges, right=True)
        self._count("margin_histogram", head * NUM_MARGIN_BINS + bins, (num_heads, NUM_MARGIN_BINS))
        if self.num_categories:
            labels = categories.to(real.device)[real]
            cell = (head * num_components + gamma.argmax(dim=-1)) * self.num_categories + labels[:, None]
            self._count("category_counts", cell, (num_heads, num_components, self.num_categories))
            mass = gamma.new_zeros(self.num_categories, num_heads, num_components).index_add_(0, labels, gamma)
            self._accumulate("category_mass", mass.permute(1, 2, 0))
        if self.num_token_types:
            types = token_types.to(real.device)[real]
            tracked = types >= 0
            mass = gamma.new_zeros(self.num_token_types, num_heads, num_components)
            self._accumulate("token_mass", mass.index_add_(0, types[tracked], gamma[tracked]))
            self._count("token_counts", types[tracked], (self.num_token_types,))

    @property
    def usage(self) -> Tensor:
        """Mean responsibilities, `(heads, components)`."""
        return self._sums["usage"] / self.num_tokens

    @property
    def usage_perplexity(self) -> Tensor:
        """Effective number of components in use, `(heads,)`."""
        return effective_number(self.usage)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the responsibilities in nats, `(heads,)`."""
        return self._sums["entropy"] / self.num_tokens

    @property
    def dead_components(self) -> Tensor:
        """`(heads, components)`, `True` where a component gets less than a tenth of an equal share."""
        return is_dead(self.usage)

    @property
    def margin(self) -> Tensor:
        """Mean difference of the two largest logits in nats, `(heads,)`."""
        return self._sums["margin"] / self.num_tokens

    @property
    def margin_histogram(self) -> Tensor:
        """Number of tokens whose margin lies between two neighbours of `MARGIN_EDGES`, `(heads, 64)`."""
        return self._sums["margin_histogram"].long()

    def margin_quantile(self, share: float) -> Tensor:
        """
        A quantile of the margins, interpolated in the histogram.

        Args:
            share (`float`): the share of the tokens below the quantile, between 0 and 1.

        Returns:
            `torch.Tensor` of shape `(heads,)`: the quantile, in nats.
        """
        below = self.margin_histogram.double().cumsum(dim=-1) / self.num_tokens
        index = (below >= share).double().argmax(dim=-1, keepdim=True)  # the first bin that reaches the share
        end = below.gather(-1, index).squeeze(-1)
        start = torch.where(index > 0, below.gather(-1, (index - 1).clamp(min=0)), 0.0).squeeze(-1)
        index = index.squeeze(-1)
        fraction = (share - start) / (end - start)
        return MARGIN_EDGES[index] + fraction * (MARGIN_EDGES[index + 1] - MARGIN_EDGES[index])

    @property
    def stability_bound(self) -> Tensor:
        """Mean of the largest spread of the gradients of the components, `(heads,)`, see `routing.py`."""
        return self._sums["stability_bound"] / self.num_tokens

    @property
    def sensitivity(self) -> Tensor:
        """Mean Frobenius norm of the derivative of the responsibilities, `(heads,)`."""
        return self._sums["sensitivity"] / self.num_tokens

    @property
    def category_counts(self) -> Tensor:
        """Number of tokens with each most responsible component and each category, `(heads, components, categories)`."""
        return self._sums["category_counts"].long()

    @property
    def category_mass(self) -> Tensor:
        """Sum of responsibilities over the tokens of each category, `(heads, components, categories)`."""
        return self._sums["category_mass"]

    def top_tokens(self, head: int, component: int, count: int = 8) -> list[tuple[int, int, float]]:
        """
        The tokens that a component prefers: the tokens with the largest excess over the component's share of all tokens.

            excess_t = sum over the occurrences of token t of (gamma_c - usage_c)

        Args:
            head (`int`): number of the head.
            component (`int`): number of the component.
            count (`int`, *optional*, defaults to `8`): the largest number of tokens. Tokens without an excess are left out.

        Returns:
            `list[tuple[int, int, float]]`: token type, number of occurrences, and mean responsibility of the component for
            the type; the best type first.
        """
        mass, counts = self._sums["token_mass"][:, head, component], self._sums["token_counts"]
        excess = mass - counts * self.usage[head, component]
        best = excess.topk(min(count, len(excess)))
        return [
            (index, int(counts[index]), float(mass[index] / counts[index]))
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if value > 0
        ]

    def _accumulate(self, name: str, batch: Tensor) -> None:
        # In float64, so that a million tokens still count
        batch = batch.cpu().double()
        self._sums[name] = self._sums[name] + batch if name in self._sums else batch

    def _count(self, name: str, cells: Tensor, shape: tuple[int, ...]) -> None:
        size = torch.Size(shape).numel()
        self._accumulate(name, torch.bincount(cells.flatten(), minlength=size).view(shape))


@dataclass
class LayerStatistics:
    """
    Statistics of one layer.

    Args:
        name (`str`): module name of the mixture.
        queries ([`RoutingStatistics`]): statistics of the queries, which read.
        keys ([`RoutingStatistics`]): statistics of the keys, which write.
    """

    name: str
    queries: RoutingStatistics
    keys: RoutingStatistics


def collect_statistics(
    model: nn.Module, batches: Iterable[TokenBatch], num_categories: int = 0, num_token_types: int = 0
) -> dict[str, LayerStatistics]:
    """
    Let a model read batch after batch, and add up the statistics of its mixtures.

    Args:
        model (`nn.Module`): a model with Gaussian mixture attention, native or converted, of any modality.
        batches (`Iterable[TokenBatch]`): the inputs. The `attention_mask` of a batch marks real tokens. Without a mask,
            tokens that write nothing in any head count as padding.
        num_categories (`int`, *optional*, defaults to `0`): number of categories that `categories` of the batches index; 0
            for none.
        num_token_types (`int`, *optional*, defaults to `0`): number of token types that `token_types` of the batches index;
            0 for none.

    Returns:
        `dict[str, LayerStatistics]`: the statistics of every mixture that ran, by module name, in the order in which they
        run.

    Raises:
        AnalysisError: if the model has no Gaussian mixtures.
    """
    layers: dict[str, LayerStatistics] = {}
    current: list[TokenBatch] = []

    def add(call: MixtureCall) -> None:
        batch = current[0]
        if call.name not in layers:
            queries, keys = (RoutingStatistics(num_categories, num_token_types) for _ in range(2))
            layers[call.name] = LayerStatistics(call.name, queries, keys)
        layer = layers[call.name]
        for statistics, states in ((layer.queries, call.query), (layer.keys, call.key)):
            real = _real_tokens(states, batch.inputs.get("attention_mask"), call.real)
            statistics.add(route(call.mixture, states), real, batch.categories, batch.token_types)

    with watch_mixtures(model, add):
        for batch in batches:
            current[:] = [batch]
            run(model, batch.inputs)
    return layers


def _real_tokens(states: Tensor, attention_mask: Tensor | None, writing: Tensor | None) -> Tensor:
    """Real tokens as `True` in `(batch, length)`, for states `(batch, heads, length, routing_dim)`."""
    shape = (states.shape[0], states.shape[2])
    for mask in (attention_mask, writing):
        if mask is not None and mask.ndim == 2 and mask.shape[1] == shape[1]:
            return (mask != 0).expand(shape)
    return torch.ones(shape, dtype=torch.bool, device=states.device)
