# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments of one stage of a distillation."""

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
    """`TrainingArguments` of one stage, and what is particular to it.

    Args:
        stage: "attention_transfer": every converted layer learns to reproduce what softmax made of the teacher's hidden
            states; only what the conversion added is trained, and no second model is needed. "distillation": the model learns
            to reproduce the teacher's logits and hidden states. "finetune": the usual loss of the task.
        gma_learning_rate: learning rate of what the conversion added, with the same schedule as `learning_rate`, which it gets
            when this is None. In the first stage there is nothing else.
        trainable: regular expression; of the parameters that the model had before, those whose names match are trained, in the
            last two stages. "" trains none of them; the default trains all.
        temperature: T of the KL divergence between the logits.
        logits_weight: weight of the KL divergence, in nats per token.
        hidden_weight: weight of the distance of the hidden states.
        hidden_kind: "mse", ||s - t||^2 / ||t||^2 token by token; or "cosine", 1 - cos(s, t).
        hidden_layers: "all", or "last": the hidden states after the last layer alone.
        embedding_weight: weight of 1 - cos between embeddings of whole texts, for models that embed texts.
        embedding_pooling: how those are made: "mean" over the tokens, or "cls", the first one.
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
    """What a conversion added to a model: mixtures, routing maps, forgetting gates and windows."""
    return [parameter for layer in expect_gma_layers(model).values() for parameter in layer.parameters()]


def choose_trainable(model: nn.Module, args: GMADistillationArguments) -> bool:
    """
    Set which parameters a stage trains. Adapters, which come with frozen weights, are left as they are.

    Returns:
        `bool`: whether parameters that the model had before are among them.
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
