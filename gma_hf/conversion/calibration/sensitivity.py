# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Which layers can do without softmax: how much the outputs change when one layer alone is converted."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.install import gma_layers, unchanged_on_error
from ..config import expect_bool, whole_number
from ..convert import convert_to_gma, revert_to_softmax
from ..discovery import find_attention_layers
from ..distillation.losses import kl_divergence, real_tokens
from .calibrate import calibrate
from .data import as_it_is, model_batches, no_cache
from .teacher import as_teacher


class LayerSensitivity(NamedTuple):
    """
    How much the conversion of one layer alone changes the outputs of the model.

    Args:
        index (`int`): number of the layer among the self-attention layers, as [`convert_to_gma`] counts them.
        name (`str`): name of the attention module.
        distance (`float`): KL divergence to the logits of the unconverted model, in nats per token. For models without
            logits, 1 - cos of the last hidden states.
    """

    index: int
    name: str
    distance: float


def rank_layers(
    model: PreTrainedModel,
    data: Iterable,
    *,
    max_tokens: int = 16_384,
    calibration_options: dict[str, Any] | None = None,
    progress: bool = True,
    **conversion_options: Any,
) -> list[LayerSensitivity]:
    """
    Rank the layers of a model by how much its outputs change when one layer is converted and calibrated.

    Args:
        model (`PreTrainedModel`): a model without converted layers. Afterwards the model is as before.
        data (`Iterable`): data as for [`calibrate`]. The function reads them twice.
        max_tokens (`int`, *optional*, defaults to `16384`): number of tokens on which the outputs are compared.
        calibration_options (`dict`, *optional*): arguments of [`calibrate`].
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.
        conversion_options (`Any`, *optional*): arguments of [`convert_to_gma`]. Layers outside of `layers` are not ranked.

    Returns:
        `list[LayerSensitivity]`: the layers, the most sensitive layer first.

    Raises:
        ValueError: see [`convert_to_gma`] and [`calibrate`]; also if `data` can be read only once.
    """
    if isinstance(data, Iterator):
        raise ValueError("`data` can be gone through only once, and this needs it twice. Give a list or a data set.")
    whole_number("max_tokens", max_tokens, 1)
    expect_bool("progress", progress)
    candidates = find_attention_layers(model, conversion_options.get("example_inputs"))
    names = (layer.full_name for layer in candidates if layer.is_self_attention)
    indices = {name: index for index, name in enumerate(names)}
    if "recipe" in conversion_options:
        # Rank every layer, also layers that the recipe would keep
        conversion_options.setdefault("layers", list(range(len(indices))))
    with unchanged_on_error(model):
        convert_to_gma(model, **conversion_options)
        # Layers see the hidden states of the unconverted model, so one calibration serves for each of them alone
        calibrate(model, data, **{"progress": progress, **(calibration_options or {})})
        layers = gma_layers(model)
        distances = dict.fromkeys(layers, 0.0)
        num_tokens = 0
        with as_it_is(model), torch.no_grad(), tqdm(desc="Ranking", unit="batch", disable=not progress) as bar:
            for batch in model_batches(model, data, batch_size=8):
                inputs = no_cache(model, batch)
                with as_teacher(model):
                    target = model(**inputs)
                for name, layer in layers.items():
                    with as_teacher(model, students=[layer]):
                        distance, count = output_distance(batch, model(**inputs), target)
                    distances[name] += distance.item()
                num_tokens += count
                bar.update()
                if num_tokens >= max_tokens:
                    break
        revert_to_softmax(model)
    ranking = [LayerSensitivity(indices[name], name, total / num_tokens) for name, total in distances.items()]
    return sorted(ranking, key=lambda layer: -layer.distance)


def choose_layers(ranking: list[LayerSensitivity], keep: int) -> list[int]:
    """
    The layers to convert if the most sensitive layers stay softmax.

    Args:
        ranking (`list[LayerSensitivity]`): the result of [`rank_layers`].
        keep (`int`): how many layers stay softmax.

    Returns:
        `list[int]`: indices for `convert_to_gma(model, layers=...)`.

    Raises:
        ValueError: if no layer would be left to convert.
    """
    if not 0 <= keep < len(ranking):
        raise ValueError(
            f"`keep` must lie between 0 and {len(ranking) - 1}, got {keep}: {len(ranking)} layers are ranked."
        )
    return sorted(layer.index for layer in ranking[keep:])


def output_distance(batch: dict[str, Any], outputs: Any, target: Any) -> tuple[Tensor, int]:
    """
    Distance of the outputs of a model to the outputs of the target, summed over real tokens, and the number of these tokens.
    """
    if "logits" in outputs:
        real = real_tokens(batch, outputs["logits"].shape[:-1])
        return kl_divergence(outputs["logits"], target["logits"], real), int(real.sum())
    hidden = outputs["last_hidden_state"].float()
    real = real_tokens(batch, hidden.shape[:-1])
    cosine = F.cosine_similarity(hidden, target["last_hidden_state"].float(), dim=-1)
    return ((1 - cosine) * real).sum(), int(real.sum())
