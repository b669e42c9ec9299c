# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Health of the mixtures while they train: are the components used, how sharply are tokens routed, did a layer collapse?

For a head with responsibilities gamma_c(k_t) of the keys k_t that real tokens write with:

    usage_c          = mean over t of gamma_c(k_t)               the share of the memory's writes in component c
    usage perplexity = exp(-sum_c usage_c log usage_c)           between 1 (one component takes all) and C (all alike)
    entropy          = mean over t of -sum_c gamma_c log gamma_c  in nats, 0 for hard routing, log C for none
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

COLLAPSE_PERPLEXITY = 1.5  # of 64 components, say, barely more than one is used
MAX_EXAMPLES = 8  # that the health is measured on, if a batch holds them; every process takes the same ones


@dataclass
class MixtureHealth:
    """What the keys of one layer's mixtures look like, one number per head.

    Attributes:
        usage: `[heads, C]` mean responsibility over real tokens.
        usage_perplexity: `[heads]` effective number of components in use.
        entropy: `[heads]` mean entropy of the responsibilities, in nats.
        dead_components: `[heads]` components with less than a tenth of an equal share of the writes.
    """

    usage: torch.Tensor
    usage_perplexity: torch.Tensor
    entropy: torch.Tensor
    dead_components: torch.Tensor

    @classmethod
    def from_sums(cls, responsibility_sum: torch.Tensor, entropy_sum: torch.Tensor, count: torch.Tensor):
        """From sums over tokens: `[heads, C]`, `[heads]`, and the number of tokens."""
        usage = responsibility_sum / count
        return cls(
            usage=usage,
            usage_perplexity=effective_number(usage),
            entropy=entropy_sum / count,
            dead_components=is_dead(usage).sum(dim=-1),
        )

    @property
    def collapsed(self) -> bool:
        """Whether the heads of this layer, in the mean, use hardly more than one of their components."""
        num_components = self.usage.shape[-1]
        threshold = min(COLLAPSE_PERPLEXITY, 1 + 0.1 * (num_components - 1))
        return num_components > 1 and self.usage_perplexity.mean().item() < threshold


class MixtureHealthCallback(TrainerCallback):
    """Log the health of the mixtures at every evaluation, and warn when a layer collapses.

    Logged over all layers and heads: `mixture/usage_perplexity` and `mixture/entropy` (means),
    `mixture/usage_perplexity_min`, `mixture/dead_components` (total). At evaluations they are also added to the
    metrics that `evaluate` returns. `health` keeps the last report, by layer. Nothing happens for models without
    mixtures. Weights, gradients and random states stay as they are.

    Args:
        trainer: the trainer to log through: `trainer.add_callback(MixtureHealthCallback(trainer))`.
        every_steps: also report every so many training steps.
    """

    def __init__(self, trainer: "Trainer", every_steps: int | None = None):
        self.trainer = trainer
        self.every_steps = every_steps
        self.health: dict[str, MixtureHealth] = {}
        self._collapsed: set[str] = set()

    def on_evaluate(self, args, state, control, metrics: dict | None = None, eval_dataloader=None, **kwargs):
        summary = self._report(eval_dataloader)
        if summary and metrics is not None:
            prefix = next((name.removesuffix("_loss") for name in metrics if name.endswith("_loss")), "eval")
            metrics.update({f"{prefix}_{name}": value for name, value in summary.items()})

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
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
        # Logging withdraws a request to log, which may be the one for this step's loss
        should_log = self.trainer.control.should_log
        self.trainer.log(dict(summary))
        self.trainer.control.should_log = should_log
        return summary

    def _warn_of_collapse(self) -> None:
        """Warn once of every layer that has collapsed, and again if it recovered in between."""
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
    """Return the first examples of a data set, also of a streaming one; none of a stream that can be read only once."""
    if dataset is None:
        return []
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset  # every process takes the same examples
    if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    iterator = iter(dataset)
    return [] if iterator is dataset else list(itertools.islice(iterator, count))


def summarize(health: dict[str, MixtureHealth]) -> dict[str, float]:
    """Reduce the health of all layers to the few numbers that are logged."""
    usage_perplexity = torch.cat([h.usage_perplexity for h in health.values()])
    return {
        "mixture/usage_perplexity": usage_perplexity.mean().item(),
        "mixture/usage_perplexity_min": usage_perplexity.min().item(),
        "mixture/entropy": torch.cat([h.entropy for h in health.values()]).mean().item(),
        "mixture/dead_components": sum(h.dead_components.sum().item() for h in health.values()),
    }


@torch.no_grad()
def measure_mixture_health(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, MixtureHealth]:
    """Run a model on a batch and measure its mixtures.

    Args:
        model: any model; compiled ones are run uncompiled.
        inputs: its inputs, without labels; an `attention_mask` tells real tokens from padding.

    Returns:
        The health of every `GMAMixture` that ran, by module name, on the CPU; empty if there is none.
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
