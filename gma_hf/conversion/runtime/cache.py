# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The states of converted layers inside the caches of Transformers.

The model's own code still calls `cache.update(keys, values, layer_idx)` before its attention. A converted layer hands the
new keys and values back unchanged, and its state advances when the attention function has computed it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticCache

from ...modeling.cache_gma import STATE, GMACacheLayer, StaticGMACacheLayer
from ...ops.window.tokens import GMAWindowHistory


class ConvertedCacheMixin:
    """What the state of a converted layer does in a place where Transformers expects keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Nothing is stored: the keys and values of the current tokens are what the attention needs."""
        return key_states, value_states

    def advance(self, state: Any, num_tokens: int, is_plain: bool = False) -> None:
        """
        Replace the state, `(S, z)` or the history of a window, by the one after `num_tokens` further tokens, which are plain
        if none is padding and none begins a sequence of its own.
        """
        super().update(state, None, num_tokens)

    def offload(self) -> None:
        """The state is small and stays where it is."""

    prefetch = offload

    # Code that takes finished caches apart, row by row (Whisper's `generate`), finds the rows of S and z here
    @property
    def keys(self) -> Tensor | None:
        return None if self.state is None else self.state[0]

    @property
    def values(self) -> Tensor | None:
        return None if self.state is None else self.state[1]

    @keys.setter
    def keys(self, keys: None): ...

    @values.setter
    def values(self, values: None): ...


class ConvertedCacheLayer(ConvertedCacheMixin, GMACacheLayer):
    """
    The state of one converted layer in a cache that grows.

    Attributes:
        num_plain (`int`): how many tokens came last of which it is known, without a look at their values, that all rows
            had them and that no sequence began.
    """

    def __init__(self):
        super().__init__()
        self.num_plain = 0

    def advance(self, state: Any, num_tokens: int, is_plain: bool = False) -> None:
        super().advance(state, num_tokens)
        self.num_plain = self.num_plain + num_tokens if is_plain else 0

    @property
    def window_history(self) -> GMAWindowHistory | None:
        """What a layer with a window goes on from; it says so if the window and the sinks are full."""
        history = super().window_history
        if history is None:
            return None
        num_places = sum(x.shape[2] for x in (history.keys, history.sink_keys) if x is not None)
        return history._replace(valid=None, sink_valid=None) if self.num_plain >= num_places else history

    def lazy_initialization(self, state: Any, conv_history: None = None) -> None:
        # What is stored takes the place of what was there: no zeros to be copied into
        if not self.is_initialized:
            self.device, self.dtype = state[STATE].device, state[STATE].dtype
            self.is_recurrent_states_initialized.update((i, x is not None) for i, x in enumerate(state))
            self.is_initialized = True

    def _store(self, states: dict[int, Tensor], index: int, new_state: Tensor):
        # The last tokens of a long prompt would keep all of it in memory; what is no such part needs no copy
        is_part = torch.compiler.is_compiling() or new_state.untyped_storage().nbytes() > 2 * new_state.nbytes
        states[index] = new_state.clone() if is_part else new_state


class StaticConvertedCacheLayer(ConvertedCacheMixin, StaticGMACacheLayer):
    """The state of one converted layer in a `StaticCache`."""


def converted_cache_layer(cache: Cache, layer_idx: int) -> ConvertedCacheLayer | StaticConvertedCacheLayer:
    """
    The state of layer `layer_idx`, put into the cache if it is not there yet.

    Args:
        cache (`Cache`): the cache that the model was given or made.
        layer_idx (`int`): the layer's index in it.

    Raises:
        ValueError: if the layer holds keys and values already.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while len(cache.layers) <= layer_idx:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    layer = cache.layers[layer_idx]
    if isinstance(layer, ConvertedCacheMixin):
        return layer
    if getattr(layer, "is_initialized", False) and int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"Layer {layer_idx} of the cache already holds a {type(layer).__name__} with content, but this layer of the "
            "model was converted to GMA. Was the cache filled by another model, or by a prefix-tuning adapter?"
        )
    if isinstance(cache, StaticCache):
        layer = StaticConvertedCacheLayer(max(getattr(other, "max_cache_len", -1) for other in cache.layers))
    else:
        layer = ConvertedCacheLayer()
    cache.layers[layer_idx] = layer
    if getattr(cache, "offloading", False) and all(isinstance(other, GMACacheLayer) for other in cache.layers):
        cache.offloading = False  # nothing is left to move
    return layer
