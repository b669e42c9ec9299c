# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A long prompt that all processes of a group read together, before each of them, or one, generates."""

from typing import Any

import torch
from torch import nn

from .batches import split_batch
from .context import ContextParallel, context_parallel


@torch.no_grad()
def prefill(context: ContextParallel, model: nn.Module, **inputs: Any) -> Any:
    """
    Read all tokens of a prompt but the last one, each process its part.

    Args:
        context ([`ContextParallel`]): the processes.
        model (`PreTrainedModel`): a causal GMA language model, native or converted.
        inputs: `input_ids` and `attention_mask` of the whole prompt, the same on every process.

    Returns:
        `Cache`: the same on every process, for `model.generate(**inputs, past_key_values=cache)` outside of the context.

    Raises:
        ValueError: if the prompt cannot be cut.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    part = split_batch(context, {name: value[:, :-1] for name, value in inputs.items()})
    with context_parallel(context):
        return model(**part, use_cache=True, logits_to_keep=1).past_key_values
