# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The health of the mixtures during a training: are the components used, how sharply are tokens routed, has a layer collapsed?

For a head with responsibilities gamma_c(k_t) of the keys k_t of real tokens:

    usage_c          = mean over t of gamma_c(k_t)               the share of the memory's writes in component c
    usage perplexity = exp(-sum_c usage_c log usage_c)           between 1 (one component takes all) and C (equal use)
    entropy          = mean over t of -sum_c gamma_c log gamma_c  in nats, 0 for hard routing, log C for no routing
    dead             : usage_c < 1 / (10 C)                      a tenth of an equal share
"""

import itertools
import logging
import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import IterableDatasetShard

from ..analysis.collection import MixtureCall, watch_mixtures
from ..analysis.statistics import effective_number, is_dead
from ..compat import prepare_inputs
from ..modeling import GMAMixture


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.getLogger(__name__)

COLLAPSE_PERPLEXITY = 1.5  # barely more than one component is used
MAX_EXAMPLES = 8  # examples for the measurement; every process takes the same ones


@dataclass
class MixtureHealth:
    """
    The health of the mixtures of one layer, measured on keys.

    Args:
        usage (`torch.Tensor` of shape `(heads, components)`): mean responsibility over real tokens.
        usage_perplexity (`torch.Tensor` of shape `(heads,)`): effective number of components in use.
        entropy (`torch.Tensor` of shape `(heads,)`): mean entropy of the responsibilities, in nats.
        dead_components (`torch.Tensor` of shape `(heads,)`): number of components with less than a tenth of an equal share
            of the writes.
    """

    usage: torch.Tensor
    usage_perplexity: torch.Tensor
    entropy: torch.Tensor
    dead_components: torch.Tensor

    @classmethod
    def from_sums(cls, responsibility_sum: torch.Tensor, entropy_sum: torch.Tensor, count: torch.Tensor):
        """
        Compute the health from sums over tokens.

        Args:
            responsibility_sum (`torch.Tensor` of shape `(heads, components)`): sum of the responsibilities.
            entropy_sum (`torch.Tensor` of shape `(heads,)`): sum of the entropies, in nats.
            count (`torch.Tensor`): number of tokens.

        Returns:
            [`MixtureHealth`]: the means.
        """
        usage = responsibility_sum / count
        return cls(
            usage=usage,
            usage_perplexity=effective_number(usage),
            entropy=entropy_sum / count,
            dead_components=is_dead(usage).sum(dim=-1),
        )

    @property
    def collapsed(self) -> bool:
        """Whether the heads of this layer, on average, use hardly more than one component."""
        num_components = self.usage.shape[-1]
        threshold = min(COLLAPSE_PERPLEXITY, 1 + 0.1 * (num_components - 1))
        return num_components > 1 and self.usage_perplexity.mean().item() < threshold


class MixtureHealthCallback(TrainerCallback):
    """
    Log the health of the mixtures at every evaluation, and warn when a layer collapses.

    Logged over all layers and heads: `mixture/usage_perplexity` and `mixture/entropy` (means),
    `mixture/usage_perplexity_min`, `mixture/dead_components` (total). At evaluations, these numbers are also added to the
    metrics that `evaluate` returns. `health` keeps the last report, by layer. Models without mixtures have no report.
    Weights, gradients and random states do not change.

    Args:
        trainer (`Trainer`): the trainer that logs: `trainer.add_callback(MixtureHealthCallback(trainer))`.
        every_steps (`int`, *optional*): report after every such number of training steps, in addition to every evaluation.
    """

    def __init__(self, trainer: "Trainer", every_steps: int | None = None):
        self.trainer = trainer
        self.every_steps = every_steps
        self.health: dict[str, MixtureHealth] = {}
        self._collapsed: set[str] = set()

    def on_evaluate(self, args, state, control, metrics: dict | None = None, eval_dataloader=None, **kwargs):
        """Report at every evaluation, and add the numbers to its metrics."""
        summary = self._report(eval_dataloader)
        if summary and metrics is not None:
            prefix = next((name.removesuffix("_loss") for name in metrics if name.endswith("_loss")), "eval")
            metrics.update({f"{prefix}_{name}": value for name, value in summary.items()})

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        """Report after every `every_steps` training steps."""
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self._report(train_dataloader)

    def _report(self, dataloader) -> dict[str, float]:
        with _unchanged_random_state():
            num_examples = min(MAX_EXAMPLES, self.trainer.args.per_device_eval_batch_size)
            examples = first_examples(getattr(dataloader, "dataset", None), num_examples)
            if not examples:
                return {}
            batch = dataloader.collate_fn(examples)
            batch = prepare_inputs(self.trainer, dict(batch))
            batch.pop("labels", None)
            if getattr(self.trainer, "context", None) is not None:
                # As many tokens as a process has of a sequence in training
                length = -(-batch["input_ids"].shape[1] // self.trainer.context.size)
                batch = {name: x[:, :length] if getattr(x, "ndim", 0) == 2 else x for name, x in batch.items()}
            with self.trainer.compute_loss_context_manager():
                self.health = measure_mixture_health(self.trainer.model, batch)
        if not self.health:
            return {}
        self._warn_of_collapse()
        summary = summarize(self.health)
        # Logging resets the request to log, which may belong to the loss of this step
        should_log = self.trainer.control.should_log
        self.trainer.log(dict(summary))
        self.trainer.control.should_log = should_log
        return summary

    def _warn_of_collapse(self) -> None:
        """Warn once of every collapsed layer, and again if the layer recovered in between."""
        for name, health in self.health.items():
            if health.collapsed and name not in self._collapsed:
                logger.warning(
                    "The mixtures of %s have collapsed: in the mean its heads use %.2f of %d components (usage "
                    "perplexity). A lower --mixture_learning_rate may help.",
                    name,
                    health.usage_perplexity.mean(),
                    health.usage.shape[-1],
                )
        self._collapsed = {name for name, health in self.health.items() if health.collapsed}


def first_examples(dataset: Any, count: int) -> list:
    """The first examples of a data set, also of a streaming data set; none of a stream that can be read only once."""
    if dataset is None:
        return []
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset  # every process takes the same examples
    if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    iterator = iter(dataset)
    return [] if iterator is dataset else list(itertools.islice(iterator, count))


def summarize(health: dict[str, MixtureHealth]) -> dict[str, float]:
    """Reduce the health of all layers to the few numbers for the log."""
    usage_perplexity = torch.cat([h.usage_perplexity for h in health.values()])
    return {
        "mixture/usage_perplexity": usage_perplexity.mean().item(),
        "mixture/usage_perplexity_min": usage_perplexity.min().item(),
        "mixture/entropy": torch.cat([h.entropy for h in health.values()]).mean().item(),
        "mixture/dead_components": sum(h.dead_components.sum().item() for h in health.values()),
    }


@torch.no_grad()
def measure_mixture_health(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, MixtureHealth]:
    """
    Run a model on a batch, and measure the health of its mixtures.

    Args:
        model (`nn.Module`): any model. A compiled model runs uncompiled.
        inputs (`dict[str, torch.Tensor]`): the arguments of the model, without labels. An `attention_mask` marks real
            tokens.

    Returns:
        `dict[str, MixtureHealth]`: the health of every `GMAMixture` that ran, by module name, on the CPU; empty if there is
        none.
    """
    if not any(isinstance(module, GMAMixture) for module in model.modules()):
        return {}
    sums: dict[str, list[torch.Tensor]] = {}

    def add(call: MixtureCall) -> None:
        gamma = call.mixture.responsibilities(call.key)  # [batch, heads, length, C]
        mask = inputs.get("attention_mask")
        real = gamma.new_ones(gamma.shape[0], gamma.shape[2]) if mask is None else mask.to(gamma)
        real = real[:, None, :, None]
        new = [(gamma * real).sum(dim=(0, 2)), (torch.special.entr(gamma) * real).sum(dim=(0, 2, 3)), real.sum()]
        sums[call.name] = [a + b for a, b in zip(sums[call.name], new, strict=True)] if call.name in sums else new

    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), watch_mixtures(model, add):
            model(**inputs)
    finally:
        model.train(was_training)
    return {name: MixtureHealth.from_sums(*(part.float().cpu() for part in parts)) for name, parts in sums.items()}


@contextmanager
def _unchanged_random_state():
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
