# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The states of converted layers inside the caches of Transformers.

The model's own code still calls `cache.update(keys, values, layer_idx)` before its attention. A converted layer hands the
new keys and values back unchanged, and its state advances when the attention function has computed it.
"""

from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticCache

from ...modeling.cache_gma import GMACacheLayer, StaticGMACacheLayer, foreign_content


def converted_cache_layer(cache: Cache, layer_idx: int) -> GMACacheLayer:
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
    if isinstance(layer, GMACacheLayer):
        return layer
    if getattr(layer, "is_initialized", False) and int(layer.get_seq_length()) > 0:
        raise ValueError(foreign_content(layer, layer_idx))
    if isinstance(cache, StaticCache):
        layer = StaticGMACacheLayer(max(getattr(other, "max_cache_len", -1) for other in cache.layers))
    else:
        layer = GMACacheLayer()
    cache.layers[layer_idx] = layer
    if getattr(cache, "offloading", False) and all(isinstance(other, GMACacheLayer) for other in cache.layers):
        cache.offloading = False  # nothing is left to move
    return layer
