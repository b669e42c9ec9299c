# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Which of a model's attention layers to convert."""

from collections.abc import Sequence

from .probe import AttentionLayer


def select_layers(
    attention_layers: Sequence[AttentionLayer],
    layers: Sequence[int | str] | float | str | None,
    keep_every: int | None,
) -> list[AttentionLayer]:
    """
    Args:
        attention_layers (`Sequence[AttentionLayer]`): all of the model, in its order.
        layers, keep_every: as in [`convert_to_gma`].

    Returns:
        `list[AttentionLayer]`: the self-attention layers to convert, in the order of the model.

    Raises:
        ValueError: if there is none, or one of them cannot be converted.
    """
    candidates = [layer for layer in attention_layers if layer.is_self_attention]
    if layers is None:
        chosen = candidates
    elif isinstance(layers, float):
        chosen = spread_evenly(candidates, layers)
    elif isinstance(layers, int):
        raise ValueError(
            f"`layers={layers}` is no choice of layers. Give a list of indices, `[{layers}]`, or a fraction."
        )
    else:
        entries = [layers] if isinstance(layers, str) else list(layers)
        indices = {index for entry in entries for index in find_entry(candidates, entry)}
        chosen = [candidates[index] for index in sorted(indices)]
    if keep_every is not None:
        chosen = [layer for number, layer in enumerate(chosen, 1) if number % keep_every != 0]
    if not chosen:
        raise ValueError(
            f"No layer is left to convert: `layers={layers!r}`, `keep_every={keep_every!r}`, and the model has "
            f"{len(candidates)} self-attention layers."
        )
    for layer in chosen:
        if layer.obstacles:
            raise ValueError(
                f"{layer.name} ({type(layer.module).__name__}) cannot be converted: {layer.obstacles[0]}."
            )
    return chosen


def spread_evenly(candidates: list[AttentionLayer], fraction: float) -> list[AttentionLayer]:
    """That fraction of the layers, at least one, evenly spread."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"A fraction of layers must lie in (0, 1], got {fraction}.")
    number = len(candidates)
    count = max(1, round(fraction * number))
    return [candidates[i] for i in range(number) if (i + 1) * count // number > i * count // number]


def find_entry(candidates: list[AttentionLayer], entry: int | str) -> list[int]:
    """The positions among the candidates that an entry of `layers` means."""
    number = len(candidates)
    if isinstance(entry, str):
        beginning = f"{entry.rstrip('.')}."
        found = [
            i
            for i, layer in enumerate(candidates)
            if any(f"{name}.".startswith(beginning) for name in (layer.name, layer.full_name))
        ]
        if not found:
            names = ", ".join(layer.name for layer in candidates)
            raise ValueError(
                f"No self-attention layer has a name that begins with {entry!r}. Their names are: {names}."
            )
        return found
    if isinstance(entry, bool) or not isinstance(entry, int) or not -number <= entry < number:
        raise ValueError(
            f"`layers` holds {entry!r}, but the model has {number} self-attention layers. Give indices from {-number} to "
            f"{number - 1}, or names of modules."
        )
    return [entry % number]
