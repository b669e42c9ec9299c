# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The result of an analysis as one object, for notebooks, plots, the HTML page and the JSON file."""

import math
from dataclasses import asdict, dataclass
from html import escape

from torch import Tensor

from .. import __version__
from .alignment import Alignment
from .collection import LayerResponsibilities
from .errors import AnalysisError
from .statistics import MARGIN_EDGES, RoutingStatistics
from .surface import CATEGORIES
from .text import CATEGORY_NAMES


FORMAT = "gma_hf.analysis/1"
MARGIN_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
WORDS = ("word", "capitalised", "function word")


@dataclass
class RoleReport:
    """
    The analysis of the queries, or of the keys, of one layer.

    Args:
        statistics ([`RoutingStatistics`]): usage, entropy, margins, stability.
        alignment ([`Alignment`]): agreement of components and surface categories, with its control.
    """

    statistics: RoutingStatistics
    alignment: Alignment


@dataclass
class LayerReport:
    """
    The analysis of one layer.

    Args:
        name (`str`): module name of the mixture.
        label (`str`): short name for figures: the part of the name that differs between layers.
        queries (`RoleReport`): the queries of the layer.
        keys (`RoleReport`): the keys of the layer.
        correlate (`bool`, *optional*, defaults to `False`): whether the layer compares routes by their correlation.
    """

    name: str
    label: str
    queries: RoleReport
    keys: RoleReport
    correlate: bool = False


@dataclass
class TokenRoute:
    """
    The route of one token, from layer to layer.

    Args:
        token (`str`): the token, with visible white space.
        position (`int`): the position of the token in its text.
        labels (`list[str]`): short names of the layers.
        components (`dict[str, list[torch.Tensor]]`): for `queries` and `keys`, per layer `(heads,)`: the most responsible
            component of each head.
        responsibilities (`dict[str, list[torch.Tensor]]`): likewise, the responsibility of this component.
    """

    token: str
    position: int
    labels: list[str]
    components: dict[str, list[Tensor]]
    responsibilities: dict[str, list[Tensor]]


@dataclass
class Excerpt:
    """
    A short piece of the text, analysed token by token.

    Args:
        tokens (`list[str]`): the tokens, with visible white space.
        categories (`list[str]`): the surface category of each token.
        labels (`dict[str, str]`): short names of the layers, by module name.
        responsibilities (`dict[str, LayerResponsibilities]`): by module name, tensors `(1, heads, length, components)`.
        affinity (`dict[str, torch.Tensor]`): by module name, the implied attention matrices `(1, heads, length, length)`.
        cut_word (`int`, *optional*): the position of the last token of the text, if its word goes on behind the excerpt.
    """

    tokens: list[str]
    categories: list[str]
    labels: dict[str, str]
    responsibilities: dict[str, LayerResponsibilities]
    affinity: dict[str, Tensor]
    cut_word: int | None = None

    def shown_position(self) -> int:
        """
        The position of the token whose route is drawn by default: the last content word of three letters or more. If there
        is none: the last whole word, then the last beginning of a word, then the last token. Function words and parts of
        words tell a reader less.

        Returns:
            `int`: the position in the excerpt.
        """
        begins = [index for index, category in enumerate(self.categories) if category in WORDS]
        behind = [*self.categories[1:], None]
        whole = [
            index
            for index in begins
            if behind[index] != "continuation"
            and index != self.cut_word
            and sum(char.isalpha() for char in self.tokens[index]) >= 3
        ]
        of_content = [index for index in whole if self.categories[index] != "function word"]
        return (of_content or whole or begins or [len(self.tokens) - 1])[-1]

    def route(self, position: int | None = None) -> TokenRoute:
        """
        The route of one token.

        Args:
            position (`int`, *optional*): the position of the token in the excerpt; by default [`Excerpt.shown_position`].

        Returns:
            [`TokenRoute`]: components and responsibilities, layer by layer.

        Raises:
            AnalysisError: if the excerpt has no such position.
        """
        if position is None:
            position = self.shown_position()
        if not -len(self.tokens) <= position < len(self.tokens):
            raise AnalysisError(
                f"There is no token {position}: the excerpt has {len(self.tokens)} tokens. Choose a position from 0 to "
                f"{len(self.tokens) - 1}."
            )
        position %= len(self.tokens)
        best = {
            role: [getattr(layer, role)[0, :, position].max(dim=-1) for layer in self.responsibilities.values()]
            for role in ("queries", "keys")
        }
        return TokenRoute(
            token=self.tokens[position],
            position=position,
            labels=[self.labels[name] for name in self.responsibilities],
            components={role: [found.indices for found in layers] for role, layers in best.items()},
            responsibilities={role: [found.values for found in layers] for role, layers in best.items()},
        )


@dataclass(repr=False)
class RoutingReport:
    """
    How a model routes the tokens of a text.

    Args:
        model_name (`str`): name of the model.
        model_type (`str`): type of the model, as in `config.json`.
        text_name (`str`): name of the text.
        num_tokens (`int`): number of tokens that were read, special tokens around the blocks included.
        block_size (`int`): tokens per forward pass.
        num_shuffles (`int`): number of shuffles for the control of the alignment.
        seed (`int`): seed of the shuffles.
        layers (`list[LayerReport]`): the layers in the order in which they run.
        token_names (`list[str]`): the tracked token types, the most frequent first, with visible white space.
        excerpt ([`Excerpt`]): the beginning of the text, token by token.
    """

    model_name: str
    model_type: str
    text_name: str
    num_tokens: int
    block_size: int
    num_shuffles: int
    seed: int
    layers: list[LayerReport]
    token_names: list[str]
    excerpt: Excerpt

    @property
    def category_counts(self) -> dict[str, int]:
        """Number of tokens of each surface category, `dict[str, int]`."""
        counts = self.layers[0].keys.statistics.category_counts[0].sum(dim=0).tolist()
        return dict(zip(CATEGORY_NAMES, counts, strict=True))

    def best_aligned(self, role: str = "keys") -> tuple[LayerReport, int]:
        """
        The head whose components separate the surface categories best, in NMI beyond the shuffled control.

        Args:
            role (`str`, *optional*, defaults to `"keys"`): `"keys"` or `"queries"`.

        Returns:
            `tuple[LayerReport, int]`: the layer, and the number of the head.
        """
        excess = [
            getattr(layer, role).alignment.nmi - getattr(layer, role).alignment.nmi_shuffled_mean
            for layer in self.layers
        ]
        layer = max(range(len(excess)), key=lambda index: float(excess[index].max()))
        return self.layers[layer], int(excess[layer].argmax())

    def top_tokens(self, layer: LayerReport, head: int, component: int, role: str = "keys", count: int = 8):
        """
        The tokens that a component prefers, see [`RoutingStatistics.top_tokens`].

        Args:
            layer ([`LayerReport`]): the layer.
            head (`int`): number of the head.
            component (`int`): number of the component.
            role (`str`, *optional*, defaults to `"keys"`): `"keys"` or `"queries"`.
            count (`int`, *optional*, defaults to `8`): the largest number of tokens.

        Returns:
            `list[tuple[str, int, float]]`: token, number of occurrences, mean responsibility of the component; the best
            token first.
        """
        found = getattr(layer, role).statistics.top_tokens(head, component, count)
        return [(self.token_names[index], occurrences, mean) for index, occurrences, mean in found]

    def __repr__(self) -> str:
        layer, head = self.best_aligned()
        return (
            f"RoutingReport of {self.model_name}: {len(self.layers)} layers, {self.num_tokens:,} tokens of {self.text_name}. "
            f"Best aligned: layer {layer.label}, head {head} (NMI {layer.keys.alignment.nmi[head]:.3f}). write_report writes "
            "it as a page."
        )

    def _repr_html_(self) -> str:
        """
        The report as a page in a frame, for notebooks. The frame keeps the styles of the page and of the notebook apart.
        """
        from .page import html_page

        return (
            f'<iframe srcdoc="{escape(html_page(self))}" title="Responsibilities of {escape(self.model_name)}" '
            'width="100%" height="640" style="border: 1px solid #888"></iframe>'
        )

    def to_dict(self, num_top_tokens: int = 8) -> dict:
        """
        The report as numbers, strings, lists and dictionaries, ready for JSON. docs/analysis.md explains the fields.

        Args:
            num_top_tokens (`int`, *optional*, defaults to `8`): number of top tokens per component.

        Returns:
            `dict`: the content of `report.json`.
        """
        return {
            "format": FORMAT,
            "gma_hf": __version__,
            "model": {"name": self.model_name, "model_type": self.model_type},
            "text": {
                "name": self.text_name,
                "num_tokens": self.num_tokens,
                "block_size": self.block_size,
                "categories": self.category_counts,
            },
            "control": {"num_shuffles": self.num_shuffles, "seed": self.seed},
            "category_descriptions": CATEGORIES,
            "margin_edges": MARGIN_EDGES.tolist(),
            "layers": [
                {
                    "name": layer.name,
                    "label": layer.label,
                    "queries": self._role_to_list(layer, "queries", num_top_tokens),
                    "keys": self._role_to_list(layer, "keys", num_top_tokens),
                }
                for layer in self.layers
            ],
            "excerpt": self._excerpt_to_dict(),
        }

    def _role_to_list(self, layer: LayerReport, role: str, num_top_tokens: int) -> list[dict]:
        statistics, alignment = getattr(layer, role).statistics, getattr(layer, role).alignment
        quantiles = {f"{share:g}": statistics.margin_quantile(share) for share in MARGIN_SHARES}
        return [
            {
                "head": head,
                "usage": statistics.usage[head].tolist(),
                "usage_perplexity": statistics.usage_perplexity[head].item(),
                "entropy": statistics.entropy[head].item(),
                "dead_components": statistics.dead_components[head].nonzero().flatten().tolist(),
                "margin": {
                    "mean": statistics.margin[head].item(),
                    "quantiles": {share: quantile[head].item() for share, quantile in quantiles.items()},
                    "histogram": statistics.margin_histogram[head].tolist(),
                },
                "stability_bound": {
                    "mean": _finite(statistics.stability_bound[head].item()),
                    "max": _finite(statistics.stability_bound_max[head].item()),
                },
                "sensitivity": _finite(statistics.sensitivity[head].item()),
                "alignment": {name: values[head].item() for name, values in asdict(alignment).items()},
                "top_tokens": [
                    [
                        {"token": token, "count": occurrences, "responsibility": mean}
                        for token, occurrences, mean in self.top_tokens(layer, head, component, role, num_top_tokens)
                    ]
                    for component in range(statistics.usage.shape[-1])
                ],
            }
            for head in range(len(statistics.usage))
        ]

    def _excerpt_to_dict(self) -> dict:
        def strongest(gamma: Tensor) -> dict:
            values, components = gamma[0].max(dim=-1)
            return {"components": components.tolist(), "responsibilities": values.tolist()}

        return {
            "tokens": self.excerpt.tokens,
            "categories": self.excerpt.categories,
            "layers": [
                {
                    "label": self.excerpt.labels[name],
                    "queries": strongest(layer.queries),
                    "keys": strongest(layer.keys),
                }
                for name, layer in self.excerpt.responsibilities.items()
            ],
        }


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
