# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The analysis of a model on a text, as one object: for notebooks, for plots, for the HTML page and the JSON file."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from .alignment import Alignment, align
from .collection import LayerResponsibilities, find_mixtures, implied_affinity, responsibilities
from .errors import AnalysisError
from .statistics import MARGIN_EDGES, RoutingStatistics, collect_statistics
from .surface import CATEGORIES, token_categories, token_surfaces, visible
from .text import CATEGORY_NAMES, check_vocabulary, default_block_size, encode_text


FORMAT = "gma_hf.analysis/1"
MARGIN_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
WORDS = ("word", "capitalised", "function word")


@dataclass
class RoleReport:
    """What was found about the queries, or the keys, of one layer.

    Attributes:
        statistics: usage, entropy, margins, stability.
        alignment: agreement of components and surface categories, with its control.
    """

    statistics: RoutingStatistics
    alignment: Alignment


@dataclass
class LayerReport:
    """What was found about one layer.

    Attributes:
        name: module name of the mixture.
        label: the short name that figures use: what tells the layer from the others.
        queries, keys: its two roles.
    """

    name: str
    label: str
    queries: RoleReport
    keys: RoleReport


@dataclass
class TokenRoute:
    """Where one token goes, from layer to layer.

    Attributes:
        token: the token, white space made visible.
        position: where it stands in its text.
        labels: short names of the layers.
        components, responsibilities: for `queries` and `keys`, per layer `[heads]`: the component that is most
            responsible for the token, and how much.
    """

    token: str
    position: int
    labels: list[str]
    components: dict[str, list[Tensor]]
    responsibilities: dict[str, list[Tensor]]


@dataclass
class Excerpt:
    """A short piece of the text, looked at token by token.

    Attributes:
        tokens: with white space made visible.
        categories: the surface category of each.
        labels: short names of the layers, by module name.
        responsibilities: by module name, `[1, heads, length, components]`.
        affinity: by module name, the implied attention matrices `[1, heads, length, length]`.
    """

    tokens: list[str]
    categories: list[str]
    labels: dict[str, str]
    responsibilities: dict[str, LayerResponsibilities]
    affinity: dict[str, Tensor]

    def shown_position(self) -> int:
        """The last token that is a whole word of three letters or more; else the last that is or begins a word, or the last.

        Function words and parts of words tell a reader less, so whole words of the text come before function words.
        """
        begins = [index for index, category in enumerate(self.categories) if category in WORDS]
        behind = [*self.categories[1:], None]
        whole = [
            index
            for index in begins
            if behind[index] != "continuation" and sum(char.isalpha() for char in self.tokens[index]) >= 3
        ]
        of_content = [index for index in whole if self.categories[index] != "function word"]
        return (of_content or whole or begins or [len(self.tokens) - 1])[-1]

    def route(self, position: int | None = None) -> TokenRoute:
        """The route of one token; by default of the last token that is a whole word, see `shown_position`.

        Raises:
            AnalysisError: there is no such position.
        """
        if position is None:
            position = self.shown_position()
        if not -len(self.tokens) <= position < len(self.tokens):
            raise AnalysisError(
                f"There is no token {position}: the excerpt has {len(self.tokens)} tokens, counted from 0."
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
    """How a model routes the tokens of a text.

    Attributes:
        model_name, model_type, text_name: what was analysed.
        num_tokens: tokens that were read, special tokens around the blocks included.
        block_size: tokens per forward pass.
        num_shuffles, seed: of the control of the alignment.
        layers: the layers in the order in which they run.
        token_names: the tracked token types, most frequent first, white space made visible.
        excerpt: the beginning of the text, token by token.
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
        """How many tokens of the text each surface category has."""
        counts = self.layers[0].keys.statistics.category_counts[0].sum(dim=0).tolist()
        return dict(zip(CATEGORY_NAMES, counts, strict=True))

    def best_aligned(self, role: str = "keys") -> tuple[LayerReport, int]:
        """The layer and head whose components tell the categories apart best, beyond the control."""
        excess = [
            getattr(layer, role).alignment.nmi - getattr(layer, role).alignment.nmi_shuffled_mean
            for layer in self.layers
        ]
        layer = max(range(len(excess)), key=lambda index: float(excess[index].max()))
        return self.layers[layer], int(excess[layer].argmax())

    def top_tokens(self, layer: LayerReport, head: int, component: int, role: str = "keys", count: int = 8):
        """What a component prefers, see `RoutingStatistics.top_tokens`: token, occurrences, mean responsibility."""
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
        """The page in a frame, for notebooks; a page of its own, so that its style and that of the notebook never mix."""
        from .page import html_page

        return (
            f'<iframe srcdoc="{escape(html_page(self))}" title="Responsibilities of {escape(self.model_name)}" '
            'width="100%" height="640" style="border: 1px solid #888"></iframe>'
        )

    def to_dict(self, num_top_tokens: int = 8) -> dict:
        """Everything as numbers, strings, lists and dictionaries, ready for JSON; docs/analysis.md explains the fields."""
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


def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    *,
    max_tokens: int | None = 100_000,
    block_size: int | None = None,
    batch_size: int = 8,
    excerpt_length: int = 32,
    max_token_types: int = 512,
    num_shuffles: int = 20,
    seed: int = 0,
    model_name: str | None = None,
    text_name: str = "text",
) -> RoutingReport:
    """Analyse how the Gaussian mixtures of a model route the tokens of a text.

    Args:
        model: a GMA model or a converted one, with any head.
        tokenizer: its tokenizer.
        text: a text of any length, or its pieces in order.
        max_tokens: read no further than so many tokens; None reads everything.
        block_size: tokens per forward pass, which start anew without a past; None means 512, or what the model can take.
        batch_size: blocks per forward pass.
        excerpt_length: tokens at the beginning of the text to look at one by one.
        max_token_types: how many different tokens, the most frequent ones, are candidates for a component's top tokens.
        num_shuffles: permutations of the control of the alignment.
        seed: of the permutations.
        model_name: how the report calls the model; None means the name of its folder or repository.
        text_name: how the report calls the text.

    Returns:
        The report. It keeps sums and the excerpt's responsibilities, so its size does not depend on the text's length.

    Raises:
        AnalysisError: the model has no Gaussian mixtures, the text is empty, or the tokenizer is another model's.
    """
    for name, value, smallest in (
        ("batch_size", batch_size, 1),
        ("excerpt_length", excerpt_length, 1),
        ("max_tokens", max_tokens, 1),
        ("max_token_types", max_token_types, 1),
        ("num_shuffles", num_shuffles, 2),
    ):
        if value is not None and value < smallest:
            raise AnalysisError(f"{name} must be at least {smallest}, got {value}.")
    find_mixtures(model)
    encoded = encode_text(tokenizer, text, max_tokens, max_token_types)
    check_vocabulary(model, encoded)
    if block_size is None:
        block_size = default_block_size(model, tokenizer)

    try:
        found = collect_statistics(
            model, encoded.batches(block_size, batch_size), len(CATEGORY_NAMES), len(encoded.type_ids)
        )
    except torch.OutOfMemoryError as error:
        raise AnalysisError(f"Out of memory: choose a smaller batch_size or block_size. {error}") from error
    except IndexError as error:
        raise AnalysisError(
            f"The model cannot read blocks of {block_size} tokens, perhaps for want of positions: choose a smaller "
            f"block_size. {error}"
        ) from error
    labels = layer_labels(list(found))
    layers = [
        LayerReport(
            name,
            labels[name],
            *(
                RoleReport(statistics, align(statistics.category_counts, num_shuffles, seed))
                for statistics in (layer.queries, layer.keys)
            ),
        )
        for name, layer in found.items()
    ]
    room = max(1, block_size - len(encoded.prefix) - len(encoded.suffix))
    excerpt_ids = encoded.token_ids[: min(excerpt_length, room)].tolist()
    return RoutingReport(
        model_name=model_name or Path(model.name_or_path).name or type(model).__name__,
        model_type=model.config.model_type,
        text_name=text_name,
        num_tokens=layers[0].keys.statistics.num_tokens,
        block_size=block_size,
        num_shuffles=num_shuffles,
        seed=seed,
        layers=layers,
        token_names=[visible(surface) for surface in token_surfaces(tokenizer, encoded.type_ids)],
        excerpt=look_closely(model, tokenizer, encoded.prefix + excerpt_ids + encoded.suffix),
    )


def look_closely(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> Excerpt:
    """Look at a short text token by token.

    Args:
        model, tokenizer: as in `analyze`.
        token_ids: the tokens, special ones included.

    Returns:
        Its responsibilities and implied attention matrices, on the CPU in float32.
    """
    inputs = {"input_ids": torch.tensor([token_ids])}
    found = {
        name: LayerResponsibilities(*(gamma.float().cpu() for gamma in layer))
        for name, layer in responsibilities(model, **inputs).items()
    }
    return Excerpt(
        tokens=[visible(surface) for surface in token_surfaces(tokenizer, token_ids)],
        categories=token_categories(tokenizer, token_ids),
        labels=layer_labels(list(found)),
        responsibilities=found,
        affinity={name: matrix.float().cpu() for name, matrix in implied_affinity(model, **inputs).items()},
    )


def layer_labels(names: list[str]) -> dict[str, str]:
    """Short names of layers: the module names without what all have in common, `layers.0.attn`, ... become `0`, ..."""
    if len(names) == 1:
        numbers = [part for part in names[0].split(".") if part.isdigit()]
        return {names[0]: numbers[-1] if numbers else names[0]}
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), 0)
    behind = next((i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), 0)
    return {name: ".".join(part[start : len(part) - behind]) for name, part in zip(names, parts, strict=True)}


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
