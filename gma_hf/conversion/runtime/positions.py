# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Positions of padded rows and packed sequences. Softmax over rotated queries and keys sees only how far apart two tokens are, so
models with RoPE count padding and other sequences like tokens, and it makes no difference. A mixture that routes rotated
vectors does not turn with them: it has to be told how many real tokens of its sequence precede a token, as `generate` tells it.
So where a call gives a padding mask, or says what is packed, and no positions, they are counted.
"""

import inspect

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...modeling.layout import count_positions, find_sequence_ids, select_padding_mask


def rotary_models(model: PreTrainedModel, converted: list[nn.Module]) -> list[PreTrainedModel]:
    """The innermost models around converted modules that rotate queries and keys and take positions."""
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    # From the outside in, so that the last to claim a module is the innermost around it
    innermost = {module: submodel for submodel in submodels for module in submodel.modules()}
    found = {innermost[module]: None for module in converted}
    return [
        submodel
        for submodel in found
        if {"position_ids", "attention_mask"} <= set(arguments(submodel))
        and any("rotary" in type(module).__name__.lower() for module in submodel.modules())
    ]


def arguments(model: PreTrainedModel) -> list[str]:
    """Names of the arguments of the forward pass."""
    return list(inspect.signature(model.forward).parameters)


def count_positions_of(model: PreTrainedModel) -> RemovableHandle:
    """Register a pre-hook that fills `position_ids` where they are missing and padding or packing is told."""
    model._gma_arguments = arguments(model)
    return model.register_forward_pre_hook(fill_positions, with_kwargs=True)


def fill_positions(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The pre-hook."""
    given = {**dict(zip(model._gma_arguments, args, strict=False)), **kwargs}
    attention_mask, seq_idx, cu_seq_lens = (given.get(name) for name in ("attention_mask", "seq_idx", "cu_seq_lens_q"))
    is_packed = seq_idx is not None or cu_seq_lens is not None
    if getattr(attention_mask, "ndim", None) != 2:
        attention_mask = None
    if given.get("position_ids") is not None or (attention_mask is None and not is_packed):
        return None
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens is None:
        return None
    (batch_size, length), device = tokens.shape[:2], tokens.device
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    sequence_ids = None
    if is_packed:
        padding_mask = select_padding_mask(attention_mask, length)
        sequence_ids = find_sequence_ids(batch_size, length, padding_mask, None, seq_idx, cu_seq_lens)
    cache = given.get("past_key_values")
    seen_tokens = cache.get_seq_length() if isinstance(cache, Cache) else 0
    given["position_ids"] = count_positions(batch_size, length, device, attention_mask, sequence_ids, seen_tokens)
    return (), given
