# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Read a long prompt with all processes of a group together, before each process, or one process, generates."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..cache_argument import CACHE_NAME
from ..modeling.cache_gma import GMACacheLayer
from .batches import split_batch
from .context import ContextParallel, context_parallel


@torch.no_grad()
def prefill(context: ContextParallel, model: nn.Module, **inputs: Any) -> Any:
    """
    Read all tokens of a prompt but the last one. Each process reads its part.

    Args:
        context ([`ContextParallel`]): the processes.
        model (`PreTrainedModel`): a causal GMA language model, native or converted.
        inputs (`torch.Tensor`): `input_ids` and `attention_mask` of the whole prompt, the same on every process.

    Returns:
        `Cache`: the same on every process, for `model.generate(**inputs, cache=cache)` outside of the context
        (`past_key_values=cache` before Transformers 5.24).

    Raises:
        ValueError: if the prompt cannot be cut.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    part = split_batch(context, {name: value[:, :-1] for name, value in inputs.items()})
    cache = DynamicCache(config=model.config)
    # Softmax layers of Transformers would put the keys of their part into the cache
    cache.gma_gathers = True
    with context_parallel(context):
        model(**part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    total = inputs["input_ids"].shape[1] - 1
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            raise ValueError(
                "The softmax layers of this model keep the keys of a window only, and parts cannot fill a window. Convert these layers too, "
                "or read the prompt in one process."
            )
        if not isinstance(layer, GMACacheLayer) and layer.keys.shape[2] < total:
            layer.keys, layer.values = context.gather(layer.keys, 2), context.gather(layer.values, 2)
    del cache.gma_gathers
    return cache
