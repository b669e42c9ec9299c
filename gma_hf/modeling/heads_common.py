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
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.state import GradientState
from transformers import GenerationConfig
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import logging


logger = logging.get_logger(__name__)

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
    Turn the loss of a head into the share of its batch in the loss of the step. A head whose loss is no mean over its labels
    refuses accumulated batches, see [`expect_whole_step`].

    Args:
        forward (`Callable`): a `forward` with an argument `labels`.

    Returns:
        `Callable`: the same `forward`, which also takes `num_items_in_batch`, the number of labels of the step.
    """
    names = list(inspect.signature(forward).parameters)[1:]
    others = [name for name in names if is_other_label(name)]

    @functools.wraps(forward)
    def wrapper(self, *args, num_items_in_batch: torch.Tensor | int | None = None, **kwargs):
        outputs = forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels = given.get("labels")
        # Objects to detect are lists, which nobody can count: `Trainer` gives no number and divides by itself
        if not isinstance(labels, torch.Tensor) or not has_mean_over_labels(self):
            expect_whole_step(self, outputs, given)
            return outputs
        if num_items_in_batch is None and not self.training:
            return outputs
        num_labels = count_labels(self, labels, given.get("shift_labels"))
        loss = outputs[0]
        if num_items_in_batch is not None:
            num_items = at_least_one(num_items_in_batch)
            expect_countable(self, given, others, num_labels, num_items)
            if getattr(outputs, "aux_loss", None) is not None and not GradientState().sync_gradients:
                logger.warning_once(
                    f"{type(self).__name__} adds a loss that balances its experts (`output_router_logits`). This loss is no mean over "
                    "tokens: the accumulated batches of a step give the mean of their balances, and not the balance of all tokens."
                )
            loss = loss * (num_labels / num_items)
        return with_loss(outputs, zero_unless(num_labels > 0, loss))

    return wrapper


# Losses that are the mean over the labels other than -100, by the name that Transformers has for each, and the ends of names of heads
# for which Transformers has none
MEANS_OVER_LABELS = (
    "ForCausalLM",
    "ForMaskedLM",
    "ForConditionalGeneration",
    "ForTokenClassification",
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
    "ForSemanticSegmentation",
)
# The mean over several codebooks, of which each has labels of its own that are ignored
HEADS_OF_CODEBOOKS = ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM")
HEADS_OF_LANGUAGE = ("LMHeadModel", "DoubleHeadsModel", "Decoder")
HEADS_OF_MEANS = (
    "EncoderDecoderModel",
    "ForAudioFrameClassification",
    "ForMaskedImageModeling",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForPreTraining",
    "ForXVector",
    "MTModel",
)


def loss_type_of(model_class: type, found: str | None) -> str | None:
    """
    The name of the loss of a head of Transformers. `Trainer` reads in it whether labels are shifted by one token.

    Args:
        model_class (`type`): the class of Transformers.
        found (`str`, *optional*): the name that Transformers read in the name of the class.
    """
    if found == "ForCausalLM" or (found is None and model_class.__name__.endswith(HEADS_OF_LANGUAGE)):
        # Heads such as BartForCausalLM compute a cross-entropy of their own, and do not shift their labels
        code = inspect.unwrap(model_class.forward).__code__
        shifts = "loss_function" in code.co_names or any(name.startswith("shift_") for name in code.co_varnames)
        return "ForCausalLM" if shifts else "ForMaskedLM"
    return found


def has_mean_over_labels(model: Any) -> bool:
    """Whether the loss of a head is a mean over its labels. The loss of CTC is a sum or a mean over rows."""
    name = type(model).__name__
    if name.endswith(HEADS_OF_CODEBOOKS):
        return False
    return model.loss_type in MEANS_OVER_LABELS or name.endswith(HEADS_OF_MEANS)


def has_sum_or_mean_over_rows(model: Any) -> bool:
    """Whether the loss of a head is a sum over rows, or a mean over rows whatever the rows hold."""
    return type(model).__name__.endswith("ForCTC")


def adds_up_to_a_step(model: Any) -> bool:
    """
    Whether the losses of the batches of a step add up to the loss of the step, so that `Trainer` must not divide by the
    number of batches. `Trainer` reads it as `accepts_loss_kwargs`.
    """
    if has_sum_or_mean_over_rows(model):
        return model.config.ctc_loss_reduction == "sum"
    return has_mean_over_labels(model)


def is_other_label(name: str) -> bool:
    """Whether an argument holds labels beside `labels`, whose mean a head adds to the mean over `labels`."""
    return "label" in name and name not in ("labels", "shift_labels", "mc_labels")


def expect_countable(
    model: Any, given: dict[str, Any], others: list[str], num_labels: torch.Tensor, num_items: torch.Tensor | int
) -> None:
    """
    Check that `num_items_in_batch` tells the share of a batch.

    Raises:
        ValueError: if the step has several batches, and the loss is the mean over other labels than those that `Trainer` counts.
    """
    name = type(model).__name__
    reason = None
    for other in others:
        if given.get(other) is not None:
            reason = (
                f"is the mean over `labels` plus the mean over `{other}`",
                f"leave `{other}` out with a head for `labels` alone",
            )
    labels, mask = given["labels"], given.get("attention_mask")
    if name.endswith("ElectraForPreTraining"):
        is_ignored = labels == IGNORED_LABEL
        is_real = torch.ones_like(labels, dtype=torch.bool) if mask is None else (mask == 1).to(labels.device)
        if bool((is_ignored & is_real).any()):
            raise ValueError(
                f"{name} has no label for tokens that are ignored, and `labels` hold -100 at real tokens. Give each of them 0 "
                "(original) or 1 (replaced), and mark padding in `attention_mask`."
            )
        if bool((is_ignored == is_real).any()):
            reason = "is the mean over the tokens of `attention_mask`", "give padding the label -100"
    elif model.loss_type == "ForSemanticSegmentation" and model.config.semantic_loss_ignore_index != IGNORED_LABEL:
        ignored = model.config.semantic_loss_ignore_index
        if bool((labels == ignored).any()):
            ways = "set `config.semantic_loss_ignore_index=-100`, and -100 in the labels"
            reason = f"is the mean over the labels other than {ignored}", ways
    elif labels.is_floating_point() and bool((labels == IGNORED_LABEL).any()):
        reason = f"has no number that is ignored, and `Trainer` does not count {IGNORED_LABEL}", "scale the labels"
    if reason is not None and bool(num_labels != num_items):
        raise ValueError(
            f"The loss of {name} {reason[0]}. `num_items_in_batch` counts the numbers other than -100 in `labels` alone, so several "
            "batches of one step would not add up to the loss of the step. Use `gradient_accumulation_steps=1` and one process, or "
            f"{reason[1]}."
        )


# How many labels each row has, of models in the middle of a step
_per_row: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def expect_whole_step(model: Any, outputs: Any, given: dict[str, Any]) -> None:
    """
    Check, during training, that a batch whose labels `Trainer` cannot count is a whole step, or that all rows of the step have
    the same number of labels: the mean over the batches is then the mean over the labels.

    Args:
        model (`PreTrainedModel`): the model.
        outputs (`ModelOutput` or `tuple`): its outputs.
        given (`dict`): the arguments of its call.

    Raises:
        ValueError: if the step has several batches whose losses do not add up.
    """
    loss = outputs[0] if isinstance(outputs, tuple) else outputs.get("loss")
    if not model.training or loss is None or loss.ndim > 0 or has_sum_or_mean_over_rows(model):
        return
    is_last = GradientState().sync_gradients
    earlier = _per_row.pop(model, None)
    if earlier is not None and all(parameter.grad is None for parameter in model.parameters()):
        earlier = None  # of a step that was interrupted
    if is_last and earlier is None:
        return
    per_row = labels_per_row(given)
    if not per_row or len({*per_row, *([] if earlier is None else [earlier])}) > 1:
        what = (
            "does not add up over batches"
            if not per_row
            else "is a mean over labels, of which the rows have different numbers"
        )
        ways = "" if not per_row else ", or give each row the same number of labels"
        raise ValueError(
            f"The loss of {type(model).__name__} {what}, and `Trainer` cannot count them: several batches of one step would not give "
            f"the update of one large batch. Use `gradient_accumulation_steps=1`{ways}."
        )
    if not is_last:
        _per_row[model] = per_row[0]


def labels_per_row(given: dict[str, Any]) -> list[int]:
    """How many masked patches, objects, or ends of an answer in the text each row has; empty for losses of other kinds."""
    masked, labels, ends = given.get("bool_masked_pos"), given.get("labels"), given.get("ends_in_text")
    if isinstance(ends, torch.Tensor):
        return ends.sum(dim=0).tolist()
    if isinstance(masked, torch.Tensor):
        return masked.sum(dim=tuple(range(1, masked.ndim))).tolist()
    if isinstance(labels, list) and all(isinstance(row, Mapping) and "class_labels" in row for row in labels):
        return [len(row["class_labels"]) for row in labels]
    return []


def trains_whole_steps(forward: Callable) -> Callable:
    """A `forward` without an argument `labels`, whose loss refuses accumulated batches, see [`expect_whole_step`]."""
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        expect_whole_step(self, outputs, {**dict(zip(names, args, strict=False)), **kwargs})
        return outputs

    return wrapper


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
            ends_in_text = torch.stack([x.reshape(len(x), -1)[:, 0] < length for x in given])
            # `Trainer` does not count them
            expect_whole_step(self, outputs, {"ends_in_text": ends_in_text})
            exists = ends_in_text.any(dim=1).all()
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
