# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the heads of native and of converted models have in common.

Generation: the ways of Transformers that GMA layers cannot take are refused before anything is generated.

The loss of a batch is its part of the loss of a whole optimization step. With gradient accumulation or several processes a step
has several batches. The loss of the step is the mean over all its labels, so a batch with n of N labels contributes

    n / N * (mean loss of the batch)

`Trainer` gives N to every model as `num_items_in_batch`. Heads of Transformers for classification ignore the number, and so do
heads that compute their loss without `self.loss_function`: the update then grows with the number of accumulated batches.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss


IGNORED_LABEL = -100


class GMAGenerationMixin:
    """What generating models with GMA layers add to `GenerationMixin`. It stands before `GenerationMixin` among the bases."""

    def generate_batch(self, *args, **kwargs):
        """
        Raises:
            ValueError: always. Continuous batching keeps keys and values of all tokens in pages, and GMA layers have none.
        """
        raise ValueError(without_pages(self))

    def init_continuous_batching(self, *args, **kwargs):
        """
        Raises:
            ValueError: always, see `generate_batch`.
        """
        raise ValueError(without_pages(self))

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args, **kwargs):
        # The target model of assisted decoding marks the configuration that it hands to its assistant
        if getattr(generation_config, "is_assistant", False) and self._is_stateful:
            raise ValueError(
                f"{type(self).__name__} has GMA layers and cannot be the `assistant_model` of assisted decoding: the target model "
                "takes back tokens that the assistant has read, and the state of a GMA layer cannot forget single tokens. Use an "
                "assistant with softmax attention, or call `generate` without `assistant_model`."
            )
        super()._prepare_cache_for_generation(generation_config, *args, **kwargs)


def without_pages(model: GMAGenerationMixin) -> str:
    """Why a model cannot generate by continuous batching."""
    return (
        f"{type(model).__name__} has GMA layers that Transformers' continuous batching cannot serve (`generate_batch`, "
        "`init_continuous_batching`, `cache_implementation='paged'`, TRL's `use_transformers_paged`): it keeps keys and values of "
        "all tokens in pages, and a GMA layer keeps one state instead. Call `generate` with a batch of padded prompts, or serve the "
        "model with vLLM (docs/serving.md)."
    )


def as_part_of_step(forward: Callable) -> Callable:
    """
    Make a head's loss the part that its batch has in the loss of the step.

    Args:
        forward (`Callable`): a `forward` with an argument `labels`, whose loss is the mean over the labels.

    Returns:
        `Callable`: the same `forward`, which takes `num_items_in_batch`, the number of labels of the step, besides.
    """
    place = list(inspect.signature(forward).parameters).index("labels") - 1  # without `self`

    @functools.wraps(forward)
    def wrapper(self, *args, num_items_in_batch: torch.Tensor | int | None = None, **kwargs):
        outputs = forward(self, *args, **kwargs)
        labels = kwargs.get("labels", args[place] if len(args) > place else None)
        if num_items_in_batch is None or labels is None:
            return outputs
        num_labels = count_labels(self, labels, kwargs.get("shift_labels"))
        loss = outputs[0] * (num_labels / num_items_in_batch)
        # The mean over no label is NaN
        loss = torch.where(num_labels > 0, loss, torch.zeros_like(loss))
        if isinstance(outputs, tuple):
            return loss, *outputs[1:]
        outputs["loss"] = loss
        return outputs

    return wrapper


def count_labels(model: Any, labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """How many labels the loss of a batch is the mean of: a causal model never predicts the first token of a row."""
    if shift_labels is not None:
        labels = shift_labels
    elif LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss and not model.config.is_encoder_decoder:
        labels = labels[..., 1:]
    return labels.ne(IGNORED_LABEL).sum()
