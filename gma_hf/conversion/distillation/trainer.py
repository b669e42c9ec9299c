# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A `Trainer` that restores the quality of a converted model, in optional stages.

Attention transfer: for each converted layer, on the queries, keys and values of the hidden states of the teacher,

    L = 1/H sum_h sum_t ||o_ht - o*_ht||^2 / sum_t ||o*_ht||^2        o of GMA, o* of softmax

The teacher is the model itself with its softmax. One forward pass of the teacher gives every layer its inputs and targets.
The layers do not depend on each other, so the gradients of a layer are computed directly after its loss, and its memory is
freed before the next layer runs. Layer-wise transfer to linear attention is known from LoLCATs (Zhang et al.,
arXiv:2410.10254).

Distillation: KL divergence to the logits of the teacher (Hinton et al., arXiv:1503.02531), and weighted distances of hidden
states and of embeddings, per real token of all batches of a step.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from ...compat import prepare_inputs, undo_preparation
from ...training.metrics import perplexity
from ...training.trainer import GMATrainer, give_own_learning_rate
from ..calibration.data import as_it_is, no_cache
from ..calibration.teacher import SoftmaxCall, as_teacher, expect_gma_layers
from .arguments import GMADistillationArguments, choose_trainable, gma_parameters
from .losses import (
    attention_distance,
    hidden_distance,
    kl_divergence,
    negative_log_likelihood,
    pooled,
    real_tokens,
    with_ready_gradient,
)


# The sums of the evaluation over the rows, and the divisor of each sum
STATISTICS = {
    "attention_error": "num_rows",
    "kl": "num_outputs",
    "nll": "num_predicted",
    "hidden_cosine": "num_hidden",
    "embedding_cosine": "num_hidden_rows",
}
COLUMNS = (*STATISTICS, *dict.fromkeys(STATISTICS.values()))


class GMADistillationTrainer(GMATrainer):
    """
    A `transformers.Trainer` for one stage of the distillation of a converted model.

    Evaluation compares with the teacher, exactly over batches and processes. Models with logits report `kl` (nats per
    token). Models without a head report `hidden_cosine` (last hidden states, per token) and `embedding_cosine`. The first
    stage reports `attention_error`. Causal language models also report `perplexity`.

    Args:
        model (`PreTrainedModel`): a model from [`convert_to_gma`], with or without adapters.
        args ([`GMADistillationArguments`]): the arguments. `stage` and `trainable` decide which parameters are frozen.
        teacher (`PreTrainedModel`, *optional*): the model before its conversion. Needed if the stage trains parameters that
            the model had before its conversion. By default the model itself, with its softmax, is the teacher.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer of the teacher, which must be equal
            to `processing_class`, the tokenizer of the student.
        kwargs (`Any`, *optional*): arguments of `transformers.Trainer`. The first two stages need no labels.

    Raises:
        ValueError: if the model has no converted layer, if teacher and student do not fit each other, or if one process has
            several GPUs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: GMADistillationArguments,
        *,
        teacher: PreTrainedModel | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        expect_gma_layers(model)
        undo_preparation(model)
        trains_old = choose_trainable(model, args)
        self.is_distilling = args.stage != "finetune"
        if self.is_distilling and args.stage == "distillation" and trains_old and teacher is None:
            raise ValueError(
                "This stage trains parameters that the model had before its conversion, so the model cannot be its own "
                "teacher. Pass the original as `teacher`, or `trainable=''` to train only what the conversion added."
            )
        if teacher is not None:
            check_teacher(model, teacher, kwargs.get("processing_class"), teacher_processing_class)
        if self.is_distilling:
            if args.n_gpu > 1:
                raise ValueError(
                    f"{args.n_gpu} GPUs in one process are not supported. Start with `accelerate launch` or `torchrun`."
                )
            kwargs.setdefault("compute_metrics", distillation_metrics)
        if args.stage == "attention_transfer":
            # DistributedDataParallel would look for used parameters in the outputs, which come from the teacher
            args.ddp_find_unused_parameters = False
        super().__init__(model, args, **kwargs)
        if self.is_distilling:
            # `compute_loss` divides by the number of tokens of all batches of a step itself
            self.model_accepts_loss_kwargs = True
        self._arguments = set(inspect.signature(type(model).forward).parameters)
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self.teacher = teacher.to(args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        Create the stock optimizer. With `gma_learning_rate`, the parameters that the conversion added get their own group.
        """
        created = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if created and self.args.gma_learning_rate is not None:
            parameters = [p for p in gma_parameters(model or self.model) if p.requires_grad]
            if parameters:
                give_own_learning_rate(optimizer, parameters, self.args.gma_learning_rate)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one step, and the number of outputs that count: the outputs at real tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.is_distilling and batches:
            num_items = sum(self._num_tokens(batch) for batch in batches).to(device)
            if self.args.world_size > 1:
                num_items = self.accelerator.gather(num_items).sum()
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of the stage, per real token of the step."""
        if not self.is_distilling:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = 1.0
        if num_items_in_batch is not None:
            # DistributedDataParallel averages gradients over the processes, but each process already divides by the tokens of
            # all
            share = self._num_tokens(inputs) / num_items_in_batch * self.args.world_size
        if self.args.stage == "attention_transfer":
            loss, outputs = self._transfer_attention(model, inputs)
        else:
            loss, outputs = self._distil(model, inputs)
        return (loss * share, outputs) if return_outputs else loss * share

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss and statistics `(batch, statistics)` of one batch, for [`distillation_metrics`]."""
        if not self.is_distilling:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = prepare_inputs(self, inputs)
        with torch.no_grad():
            loss, statistics = self._compare(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        # `Trainer` asks for metrics only where there are labels
        return loss, statistics, statistics.new_zeros(statistics.shape[0])

    def _transfer_attention(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The mean error of the layers, and the outputs of the teacher. The gradients are computed on the way."""
        losses = []

        def learn(call: SoftmaxCall) -> None:
            loss = attention_distance(call)
            if torch.is_grad_enabled():
                loss = with_ready_gradient(loss, [p for p in call.layer.parameters() if p.requires_grad])
            losses.append(loss)

        # Learning needs no logits, and logits may cost more than the attention
        options = {"logits_to_keep": 1} if torch.is_grad_enabled() and "logits_to_keep" in self._arguments else {}
        # The teacher requires no gradients. Under `no_grad`, DistributedDataParallel would expect no gradients at all
        with as_it_is(model), as_teacher(self.model, learn):
            outputs = model(**no_cache(self.model, inputs), **options)
        return torch.stack(losses).mean(), outputs

    def _distil(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """
        The weighted distances between the outputs of student and teacher, per real token, and the outputs of the student.
        """
        args = self.args
        wanted = {"output_hidden_states": True} if args.hidden_weight or args.embedding_weight else {}
        target = self._teach(inputs, wanted)
        outputs = model(**no_cache(self.model, inputs), **wanted)
        loss = 0.0
        if args.logits_weight:
            logits = expect_logits(self.model, outputs)
            real = real_tokens(inputs, logits.shape[:-1])
            divergence = kl_divergence(logits, target["logits"], real / real.sum(), args.temperature)
            loss = args.logits_weight * divergence
        if args.hidden_weight:
            hidden, target_hidden = (hidden_states(x, args.hidden_layers) for x in (outputs, target))
            real = real_tokens(inputs, hidden[0].shape[:-1])
            distance = hidden_distance(hidden, target_hidden, real / real.sum(), args.hidden_kind)
            loss = loss + args.hidden_weight * distance
        if args.embedding_weight:
            loss = loss + args.embedding_weight * (1 - self._embedding_cosine(inputs, outputs, target).mean())
        return loss, outputs

    def _teach(self, inputs: dict[str, Any], wanted: dict[str, Any]) -> Any:
        """The outputs of the teacher."""
        with torch.no_grad(), self.accelerator.autocast():
            if self.teacher is not None:
                return self.teacher(**no_cache(self.teacher, inputs), **wanted)
            with as_it_is(self.model), as_teacher(self.model):
                return self.model(**no_cache(self.model, inputs), **wanted)

    def _compare(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss, and the sums and counts of [`STATISTICS`] for each row."""
        device = self.args.device
        rows = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        sums = dict.fromkeys(COLUMNS, torch.zeros(rows, device=device))
        loss = None
        if self.args.stage == "attention_transfer":
            loss, target = self._transfer_attention(model, inputs)
            sums["attention_error"], sums["num_rows"] = loss.expand(rows), torch.ones(rows, device=device)
        else:
            target = self._teach(inputs, {})
        outputs = model(**no_cache(self.model, inputs))
        if "logits" in outputs:
            logits = outputs["logits"]
            real = real_tokens(inputs, logits.shape[:-1])
            triples = zip(logits, target["logits"], real, strict=True)
            sums["kl"] = torch.stack([kl_divergence(*triple) for triple in triples])
            sums["num_outputs"] = real.reshape(rows, -1).sum(dim=1)
            labels = self._next_tokens(inputs, logits)
            if labels is not None:
                sums["nll"], sums["num_predicted"] = negative_log_likelihood(logits, labels)
        if "last_hidden_state" in outputs:
            hidden, target_hidden = outputs["last_hidden_state"], target["last_hidden_state"]
            real = real_tokens(inputs, hidden.shape[:-1])
            cosine = F.cosine_similarity(hidden.float(), target_hidden.float(), dim=-1)
            sums["hidden_cosine"], sums["num_hidden"] = (cosine * real).sum(dim=1), real.sum(dim=1)
            sums["embedding_cosine"] = self._embedding_cosine(inputs, outputs, target)
            sums["num_hidden_rows"] = torch.ones(rows, device=device)
        if loss is None and "logits" in outputs:
            loss = sums["kl"].sum() / sums["num_outputs"].sum()
        elif loss is None:
            loss = 1 - sums["hidden_cosine"].sum() / sums["num_hidden"].sum()
        return loss.float(), torch.stack([sums[name].float() for name in COLUMNS], dim=1)

    def _embedding_cosine(self, inputs: dict[str, Any], outputs: Any, target: Any) -> Tensor:
        """Cosine between the embeddings of each text by student and teacher, `(batch,)`."""
        last, target_last = (hidden_states(x, "last")[0] for x in (outputs, target))
        real = real_tokens(inputs, last.shape[:-1])
        pooling = self.args.embedding_pooling
        return F.cosine_similarity(pooled(last, real, pooling), pooled(target_last, real, pooling), dim=-1)

    def _next_tokens(self, inputs: dict[str, Any], logits: Tensor) -> Tensor | None:
        """The tokens `(batch, length)` that a causal language model predicts; -100 at positions without a prediction."""
        tokens = inputs.get("input_ids")
        is_causal = any(layer.is_causal for layer in expect_gma_layers(self.model).values())
        if not is_causal or tokens is None or logits.shape[:-1] != tokens.shape:
            return None
        labels = inputs.get("labels")
        return labels if labels is not None else tokens.masked_fill(~real_tokens(inputs, tokens.shape), -100)

    def _num_tokens(self, inputs: dict[str, Any]) -> Tensor:
        """The number of real tokens of a batch; of its decoder, if there is one."""
        names = ("decoder_input_ids", "labels") if self.model.config.is_encoder_decoder else ()
        names = (*names, self.model.main_input_name, *inputs)
        tokens = next(inputs[name] for name in names if isinstance(inputs.get(name), Tensor))
        return real_tokens(inputs, tokens.shape[:2]).sum()


def distillation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Means of [`STATISTICS`], and the perplexity, from the sums and counts of all rows."""
    totals = dict(zip(COLUMNS, np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0), strict=True))
    means = {name: totals[name] / totals[count] for name, count in STATISTICS.items() if totals[count] > 0}
    metrics = {name: mean for name, mean in means.items() if name != "nll"}
    if "nll" in means:
        metrics["perplexity"] = perplexity(means["nll"])
    return metrics


def hidden_states(outputs: Any, layers: str) -> list[Tensor]:
    """The hidden states after all layers, or after the last one; of the decoder, if there is one."""
    states = outputs.get("decoder_hidden_states") or outputs.get("hidden_states")
    if layers == "last":
        return [outputs["last_hidden_state"] if outputs.get("last_hidden_state") is not None else states[-1]]
    # The first are the embeddings, which no attention has touched
    return list(states[1:])


def expect_logits(model: nn.Module, outputs: Any) -> Tensor:
    """
    The logits of a model.

    Raises:
        ValueError: if the model has none.
    """
    if outputs.get("logits") is None:
        raise ValueError(
            f"{type(model).__name__} has no logits to distil. Set `logits_weight=0` and give `hidden_weight` or "
            "`embedding_weight`, or load the model with a head."
        )
    return outputs["logits"]


def check_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """
    Check that teacher and student have the same tokens.

    Raises:
        ValueError: if they have not.
    """
    sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The student knows {sizes[0]} tokens and the teacher {sizes[1]}: their logits cannot be compared. The teacher "
            "must be the model that was converted, or one with the same tokenizer."
        )
    vocabularies = [getattr(x, "get_vocab", None) for x in (tokenizer, teacher_tokenizer)]
    if all(vocabularies) and vocabularies[0]() != vocabularies[1]():
        raise ValueError(
            "The teacher's tokenizer differs from the student's: the same number means different tokens. The teacher must "
            "be the model that was converted, or one with the same tokenizer."
        )
