# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The arguments of one stage of a distillation."""

import re
from dataclasses import dataclass, field, fields

from torch import nn
from transformers import TrainingArguments

from ...training.options import check_options, check_training_numbers
from ..calibration.teacher import expect_gma_layers


STAGES = ("attention_transfer", "distillation", "finetune")
HIDDEN_KINDS = ("mse", "cosine")
POOLINGS = ("mean", "cls")


@dataclass
class GMADistillationArguments(TrainingArguments):
    """
    `TrainingArguments` of one stage, with the options of a distillation.

    Args:
        stage (`str`, *optional*, defaults to `"distillation"`): "attention_transfer": every converted layer learns to
            reproduce the output of softmax on the hidden states of the teacher; only new parameters are trained, and no
            second model is needed. "distillation": the model learns to reproduce the logits and the hidden states of the
            teacher. "finetune": the usual loss of the task.
        gma_learning_rate (`float`, *optional*): learning rate of the parameters that the conversion added, with the schedule
            of `learning_rate`; by default `learning_rate`. In the first stage these are all trained parameters.
        trainable (`str`, *optional*, defaults to `".*"`): regular expression for the last two stages. Of the parameters that
            the model had before its conversion, the parameters with matching names are trained. `""` trains none of them.
        temperature (`float`, *optional*, defaults to `1.0`): temperature T of the KL divergence between the logits.
        logits_weight (`float`, *optional*, defaults to `1.0`): weight of the KL divergence, in nats per token.
        hidden_weight (`float`, *optional*, defaults to `0.0`): weight of the distance of the hidden states.
        hidden_kind (`str`, *optional*, defaults to `"mse"`): "mse": ||s - t||^2 / ||t||^2 per token. "cosine": 1 - cos(s,
            t).
        hidden_layers (`str`, *optional*, defaults to `"all"`): "all", or "last" for the hidden states after the last layer
            alone.
        embedding_weight (`float`, *optional*, defaults to `0.0`): weight of 1 - cos between the embeddings of whole texts,
            for models that embed texts.
        embedding_pooling (`str`, *optional*, defaults to `"mean"`): the embedding of a text: "mean" over the tokens, or
            "cls" for the first token.

    Raises:
        ValueError: for impossible values. The message names the option, its value and the valid choice.
    """

    stage: str = field(
        default="distillation", metadata={"help": "attention_transfer, distillation or finetune.", "choices": STAGES}
    )
    gma_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of what the conversion added; default: learning_rate."}
    )
    trainable: str = field(
        default=".*", metadata={"help": "Regular expression of the old parameters to train, too. '' for none."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL divergence."})
    logits_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL divergence to the teacher's logits."}
    )
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the distance of hidden states."})
    hidden_kind: str = field(default="mse", metadata={"help": "That distance.", "choices": HIDDEN_KINDS})
    hidden_layers: str = field(default="all", metadata={"help": "Of which layers.", "choices": ("all", "last")})
    embedding_weight: float = field(default=0.0, metadata={"help": "Weight of 1 - cos of embeddings of whole texts."})
    embedding_pooling: str = field(default="mean", metadata={"help": "How they are made.", "choices": POOLINGS})

    def __post_init__(self):
        check_training_numbers(self)
        inherited = {option.name for option in fields(TrainingArguments)}
        check_options(self, [option.name for option in fields(self) if option.name not in inherited])
        super().__post_init__()
        choices = {"stage": STAGES, "hidden_kind": HIDDEN_KINDS, "hidden_layers": ("all", "last")}
        choices["embedding_pooling"] = POOLINGS
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, valid))}."
                )
        if self.stage == "distillation" and not (self.logits_weight or self.hidden_weight or self.embedding_weight):
            raise ValueError("All weights are 0, so there is nothing to learn. Give `logits_weight`, for example.")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"`trainable` is no regular expression: {error}.") from error


def gma_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a conversion added to a model: mixtures, routing maps, forgetting gates and windows."""
    return [parameter for layer in expect_gma_layers(model).values() for parameter in layer.parameters()]


def choose_trainable(model: nn.Module, args: GMADistillationArguments) -> bool:
    """
    Set which parameters a stage trains. Adapters have frozen weights already, so models with adapters stay as they are.

    Returns:
        `bool`: whether some of the trained parameters existed before the conversion.
    """
    new = {id(parameter) for parameter in gma_parameters(model)}
    if hasattr(model, "peft_config"):
        return True
    any_old = False
    for name, parameter in model.named_parameters():
        if id(parameter) in new:
            parameter.requires_grad_(True)
            continue
        if not parameter.is_floating_point():
            continue
        chosen = args.stage != "attention_transfer" and args.trainable != "" and bool(re.search(args.trainable, name))
        parameter.requires_grad_(chosen)
        any_old |= chosen
    return any_old
