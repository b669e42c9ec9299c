# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The analysis of a model on a text: add up statistics over the whole text, and analyse its beginning token by token."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .alignment import align
from .collection import LayerResponsibilities, find_mixtures, implied_affinity, responsibilities
from .errors import AnalysisError
from .report import Excerpt, LayerReport, RoleReport, RoutingReport
from .statistics import collect_statistics
from .surface import token_categories, token_surfaces, visible
from .text import CATEGORY_NAMES, check_vocabulary, default_block_size, encode_text


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
    """
    Analyse how the Gaussian mixtures of a model route the tokens of a text.

    Args:
        model (`PreTrainedModel`): a GMA model or a converted model, with any head.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        text (`str` or `Iterable[str]`): a text of any length, or its pieces in order.
        max_tokens (`int`, *optional*, defaults to `100000`): the largest number of tokens to read; `None` reads the whole
            text.
        block_size (`int`, *optional*): tokens per forward pass. Each block starts without a past. By default 512, or less if
            the model takes less.
        batch_size (`int`, *optional*, defaults to `8`): blocks per forward pass.
        excerpt_length (`int`, *optional*, defaults to `32`): number of tokens at the beginning of the text that are analysed
            one by one.
        max_token_types (`int`, *optional*, defaults to `512`): how many of the most frequent token types are candidates for
            top tokens.
        num_shuffles (`int`, *optional*, defaults to `20`): number of shuffles for the control of the alignment, at least 2.
        seed (`int`, *optional*, defaults to `0`): seed of the shuffles.
        model_name (`str`, *optional*): name of the model in the report; by default the name of its folder or repository.
        text_name (`str`, *optional*, defaults to `"text"`): name of the text in the report.

    Returns:
        [`RoutingReport`]: the report. It keeps sums and the responsibilities of the excerpt, so its size does not depend on
        the length of the text.

    Raises:
        AnalysisError: if the model has no Gaussian mixtures, the text is empty, the tokenizer belongs to another model, a
            number is too small, or the memory of the device is too small.
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
    mixtures = find_mixtures(model)
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
            f"The model cannot read blocks of {block_size} tokens, perhaps because it has fewer positions. Choose a "
            f"smaller block_size. {error}"
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
            correlate=mixtures[name].correlate,
        )
        for name, layer in found.items()
    ]
    room = max(1, block_size - len(encoded.prefix) - len(encoded.suffix))
    excerpt_ids = encoded.token_ids[: min(excerpt_length, room)].tolist()
    excerpt = look_closely(model, tokenizer, encoded.prefix + excerpt_ids + encoded.suffix)
    with_next = encoded.prefix + encoded.token_ids[: len(excerpt_ids) + 1].tolist()
    if token_categories(tokenizer, with_next)[-1] == "continuation":
        excerpt.cut_word = len(encoded.prefix) + len(excerpt_ids) - 1
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
        excerpt=excerpt,
    )


def look_closely(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> Excerpt:
    """
    Analyse a short text token by token.

    Args:
        model (`PreTrainedModel`): a GMA model or a converted model, with any head.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        token_ids (`list[int]`): the tokens, special tokens included.

    Returns:
        [`Excerpt`]: responsibilities and implied attention matrices, on the CPU in float32.
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
    """Short names of layers: the module names without their common parts, so that `layers.0.attn`, ... become `0`, ..."""
    if len(names) == 1:
        numbers = [part for part in names[0].split(".") if part.isdigit()]
        return {names[0]: numbers[-1] if numbers else names[0]}
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), 0)
    behind = next((i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), 0)
    return {name: ".".join(part[start : len(part) - behind]) for name, part in zip(names, parts, strict=True)}
