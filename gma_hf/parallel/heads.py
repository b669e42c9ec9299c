# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Which heads work on a part: heads with an output for every token, whose loss is a share of the loss of all tokens."""

import inspect
from typing import Any

from torch import nn

from .context import current_context


# Names of Transformers for the losses of heads that see one token at a time; None for models without a head
LOSSES_BY_TOKEN = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification", None)


class PartOfRow:
    """
    Refuses, under context parallelism, everything that needs whole sequences. It stands before the model among the bases.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_context() is not None:
            expect_part(self, args, kwargs)
        return super().__call__(*args, **kwargs)


def expect_part(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """
    Refuse heads and labels that do not work on a part.

    Raises:
        ValueError: for a head that needs all tokens in one process, and for labels that were not cut with the batch.
    """
    kind = getattr(model, "loss_type", None)
    name = type(model).__name__
    if kind not in LOSSES_BY_TOKEN or getattr(model, "pooler", None) is not None:
        raise ValueError(
            f"{name} makes one output of a whole sequence, of which this process has a part. Context parallelism supports language "
            "models and token classifiers; train this model with data parallelism."
        )
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("labels") is None:
        return
    if kind == "ForCausalLM" and given.get("shift_labels") is None:
        raise ValueError(
            "The labels of a causal model are shifted by one token, across the border of two processes. Cut them with the whole "
            "batch: `model(**context.split(batch))`."
        )
    if given.get("num_items_in_batch") is None:
        raise ValueError(
            "The loss of a part is its share of the mean over all labels. Pass their number as `num_items_in_batch`, or cut the "
            "whole batch with `context.split(batch)`, which adds the number."
        )
