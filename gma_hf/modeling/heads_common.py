# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the heads of native and converted models share.

Generation: unsupported ways of Transformers to generate are refused before anything is generated.

Loss: the loss of a batch is its share of the loss of a whole optimization step. With gradient accumulation or several
processes, a step has several batches. The loss of the step is the mean over all its labels, so a batch with n of N labels
contributes

    n / N * (mean loss of the batch)

`Trainer` passes N to every model as `num_items_in_batch`. Classification heads of Transformers ignore this number, and so do
heads that compute their loss without `self.loss_function`. Their updates would grow with the number of accumulated batches.
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
    """
    The part of generating models with GMA layers that `GenerationMixin` does not have. It stands before `GenerationMixin`
    among the bases.
    """

    def generate_batch(self, *args, **kwargs):
        """
        Refuse continuous batching: it keeps keys and values of all tokens in pages, and GMA layers have none.

        Raises:
            ValueError: always.
        """
        raise ValueError(without_pages(self))

    def init_continuous_batching(self, *args, **kwargs):
        """
        Refuse continuous batching, see `generate_batch`.

        Raises:
            ValueError: always.
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
    Turn the loss of a head into the share of its batch in the loss of the step.

    Args:
        forward (`Callable`): a `forward` with an argument `labels`, whose loss is the mean over the labels.

    Returns:
        `Callable`: the same `forward`, which also takes `num_items_in_batch`, the number of labels of the step.
    """
    place = place_of(forward, "labels")
    others = [name for name in inspect.signature(forward).parameters if name in OTHER_LABELS]

    @functools.wraps(forward)
    def wrapper(self, *args, num_items_in_batch: torch.Tensor | int | None = None, **kwargs):
        outputs = forward(self, *args, **kwargs)
        labels = kwargs.get("labels", args[place] if len(args) > place else None)
        # Objects to detect are lists, which nobody can count: `Trainer` gives no number and divides by itself
        if not isinstance(labels, torch.Tensor) or not has_mean_over_labels(self):
            return outputs
        if num_items_in_batch is None and not self.training:
            return outputs
        num_labels = count_labels(self, labels, kwargs.get("shift_labels"))
        loss = outputs[0]
        if num_items_in_batch is not None:
            num_items = at_least_one(num_items_in_batch)
            for name in others:
                if kwargs.get(name) is not None and bool(num_labels != num_items):
                    raise ValueError(more_than_labels(self, name))
            loss = loss * (num_labels / num_items)
        return with_loss(outputs, zero_unless(num_labels > 0, loss))

    return wrapper


# Labels beside `labels`, whose mean a head adds to the mean over those
OTHER_LABELS = ("next_sentence_label", "sentence_order_label")


def has_mean_over_labels(model: Any) -> bool:
    """Whether the loss of a head is a mean over its labels. The loss of CTC is a sum or a mean over rows."""
    return not type(model).__name__.endswith("ForCTC")


def adds_up_to_a_step(model: Any) -> bool:
    """
    Whether the losses of the batches of a step add up to the loss of the step, so that `Trainer` must not divide by the
    number of batches. `Trainer` reads it as `accepts_loss_kwargs`.
    """
    return has_mean_over_labels(model) or model.config.ctc_loss_reduction == "sum"


def more_than_labels(model: Any, name: str) -> str:
    """Why a step cannot have several batches."""
    return (
        f"The loss of {type(model).__name__} is the mean over `labels` plus the mean over `{name}`. `num_items_in_batch` counts "
        "`labels` alone, so several batches of one step would not add up to the loss of the step. Use "
        f"`gradient_accumulation_steps=1` and one process, or leave `{name}` out with a head for `labels` alone."
    )


def adds_nothing_without_labels(forward: Callable) -> Callable:
    """
    Set the loss of a batch without any label to 0, with gradients of 0, during training. The mean over no label is NaN, and
    one step would spread NaN over all weights. In evaluation the mean stays NaN, because a 0 would lower the mean over the
    batches.

    Args:
        forward (`Callable`): a `forward` with an argument `labels`, or with `start_positions` and `end_positions`. It
            divides by `num_items_in_batch` itself if it gets this number.

    Returns:
        `Callable`: the same `forward`.
    """
    is_span = "labels" not in inspect.signature(forward).parameters
    names = ("start_positions", "end_positions") if is_span else ("labels",)
    places = [place_of(forward, name) for name in names]

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        num_items = kwargs.get("num_items_in_batch")
        if num_items is not None:
            kwargs["num_items_in_batch"] = at_least_one(num_items)
        outputs = forward(self, *args, **kwargs)
        given = [
            kwargs.get(name, args[place] if len(args) > place else None)
            for name, place in zip(names, places, strict=True)
        ]
        if any(x is None for x in given) or not self.training:
            return outputs
        if is_span:
            # Positions behind the text are ignored, see `ForQuestionAnsweringLoss`
            length = outputs[1].shape[1]
            exists = torch.stack([(x < length).any() for x in given]).all()
        else:
            exists = count_labels(self, *given, kwargs.get("shift_labels")) > 0
        return with_loss(outputs, zero_unless(exists, outputs[0]))

    return wrapper


def place_of(forward: Callable, name: str) -> int:
    """The place of a name among the positional arguments after `self`."""
    return list(inspect.signature(forward).parameters).index(name) - 1


def at_least_one(number: torch.Tensor | int) -> torch.Tensor | int:
    """The number of labels of a step as a divisor. A sum over no label is 0 already."""
    return number.clamp(min=1) if isinstance(number, torch.Tensor) else max(number, 1)


def zero_unless(exists: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """The loss, or 0 with gradients of 0 if it is a mean over nothing."""
    return torch.where(exists.to(loss.device), loss, torch.zeros_like(loss))


def with_loss(outputs: Any, loss: torch.Tensor) -> Any:
    """The outputs of a head with another loss."""
    if isinstance(outputs, tuple):
        return loss, *outputs[1:]
    outputs["loss"] = loss
    return outputs


def count_labels(model: Any, labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """The number of labels in the mean of the loss of a batch. A causal model never predicts the first token of a row."""
    if shift_labels is not None:
        labels = shift_labels
    elif LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss and not model.config.is_encoder_decoder:
        labels = labels[..., 1:]
    if labels.is_floating_point():  # numbers to predict, none of which stands for nothing
        return torch.tensor(labels.numel(), device=labels.device)
    return labels.ne(IGNORED_LABEL).sum()
