# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The state of GMA layers between forward passes, in a cache of Transformers: the sums S and z of the operator, the tokens in a
softmax window, and the last inputs of the short convolution. Its size does not depend on the number of seen tokens.

The layer replaces the recurrent layer of Transformers in a `DynamicCache` or `StaticCache`. That layer does not count
tokens, cannot be repeated or selected along the batch, and would keep S and z in the dtype of the model.
"""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
)
from transformers.utils import is_torchdynamo_compiling, is_tracing

from ..cache_argument import foreign_content
from ..compat import mark_static_address
from .memory_state import KeptValues, MemoryState, Owner


class GMACacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """
    The state of one GMA layer, native or converted, in a cache that grows.

    Attributes:
        memory ([`MemoryState`] or `None`): the state.
        kept ([`KeptValues`]): values that the layer computed from its parameters, for the next step.
        owner ([`Owner`]): the model that fills the layer.
        cumulative_length (`int`): number of seen tokens.
        num_plain (`int`): how many of the last tokens were real in all rows and began no sequence, as far as this is known
            without reading values.
    """

    is_compileable = False
    is_sliding = False
    # Tokens cannot be removed from the sums
    is_croppable = False

    def __init__(self):
        # Without `super().__init__()`: the states of `LinearAttentionCacheLayerMixin` are numbered tensors
        self.memory = None
        self.kept = KeptValues()
        self.owner = Owner()
        self.device = self.dtype = None
        self.is_initialized = False
        self.has_previous_state = {0: False}
        self.record_past = False
        self.cumulative_length = 0
        self.num_plain = 0
        self.is_expected = False  # keys and values of a converted layer, see `update`

    @property
    def has_seen_tokens(self) -> bool:
        """Whether there is a state to continue from. After a reset, a static cache holds zeros, which are no state."""
        return self.is_initialized and self.has_previous_state[0]

    @property
    def history(self) -> MemoryState | None:
        """
        The state to continue from, or `None` before the first token. `valid` is `None` if window and sink tokens are full.
        """
        if not self.has_seen_tokens:
            return None
        memory = self.memory
        if memory.valid is not None and self.num_plain > 0:
            num_places = sum(x.shape[2] for x in (memory.keys, memory.sink_keys) if x is not None)
            if self.num_plain >= num_places:
                return memory._replace(valid=None, sink_valid=None)
        return memory

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(S, z), or `None` before the first token."""
        return self.memory[:2] if self.has_seen_tokens else None

    # A model of Transformers calls `cache.update(keys, values, layer_idx)` before its attention function. A converted layer
    # needs the keys and values of the current tokens. Its state advances after the attention function has computed it
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Return the keys and values unchanged, and store nothing."""
        if not self.is_expected:
            raise ValueError(
                "A GMA model filled this cache, which has no keys and values for softmax attention. Start with a new cache."
            )
        self.is_expected = False
        return key_states, value_states

    def advance(self, memory: MemoryState, num_tokens: int, is_plain: bool = False) -> None:
        """
        Replace the state by the state after further tokens.

        Args:
            memory ([`MemoryState`]): the new state.
            num_tokens (`int`): number of processed tokens.
            is_plain (`bool`, *optional*, defaults to `False`): whether no token is padding and no token begins another
                sequence.
        """
        self.lazy_initialization(memory)
        self._store(memory)
        self.cumulative_length += num_tokens
        self.num_plain = self.num_plain + num_tokens if is_plain else 0
        self.has_previous_state[0] = True

    def _store(self, memory: MemoryState) -> None:
        # New tensors, not copies into the old ones: gradients may flow through a dynamic cache, from one segment to the next
        self.memory = memory.map(unshared)

    def lazy_initialization(self, memory: MemoryState, value_states: None = None) -> None:
        if not self.is_initialized:
            self.device, self.dtype = memory.state.device, memory.state.dtype
            self.is_initialized = True

    # Code that splits finished caches into rows (`generate` of Whisper) reads the rows of S and z here
    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.memory is None else self.memory.state

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.memory is None else self.memory.normalizer

    @property
    def batch_size(self) -> int:
        return -1 if self.memory is None else self.memory.state.shape[0]

    def update_conv_state(self, *args, **kwargs):
        raise TypeError("A GMA layer replaces its whole state at once. Call `advance`.")

    update_recurrent_state = update_conv_state

    def offload(self) -> None:
        """Do nothing: the state is small and stays on its device."""

    prefetch = offload

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys for a mask, as if all seen tokens were still there."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        """
        Do nothing for 0 tokens. A running sum cannot remove tokens.

        Raises:
            ValueError: if tokens are to be removed.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                "A GMA layer keeps running sums and cannot remove tokens from them. Copy the cache (`copy.deepcopy`) "
                "before you add tokens that you may have to remove."
            )

    def activate_past_recording(self):
        raise ValueError(
            "A GMA model cannot be rolled back, so it cannot serve as the assistant of assisted decoding. Use an assistant with "
            "softmax attention, or call `generate` without `assistant_model`."
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the beams to continue."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` only."""
        self._map_states(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times: one prompt, many continuations."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def _map_states(self, function):
        if self.memory is not None:
            self.memory = self.memory.map(function)


def unshared(x: torch.Tensor) -> torch.Tensor:
    """
    A tensor with its own memory. Otherwise the last tokens of a long prompt would keep the whole prompt in memory, and a
    state in another order would be copied in every step.
    """
    if is_tracing(x) or x.untyped_storage().nbytes() > 2 * x.nbytes:
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


class StaticGMACacheLayer(GMACacheLayer):
    """
    The state of one GMA layer in a `StaticCache`. The same tensors stay at the same addresses, and the number of seen tokens
    is a tensor. So compiled decoding does not recompile, and CUDA graphs can be replayed.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.zeros((), dtype=torch.long)

    def lazy_initialization(self, memory: MemoryState, value_states: None = None) -> None:
        if self.is_initialized:
            return
        super().lazy_initialization(memory)
        self.memory = counted(memory).map(torch.zeros_like)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            for tensor in (*self.memory, self.cumulative_length):
                if tensor is not None:
                    mark_static_address(tensor)

    def advance(self, memory: MemoryState, num_tokens: int, is_plain: bool = False) -> None:
        # The graph must not depend on whether the window is full, because one graph serves every step
        super().advance(memory, num_tokens, is_plain=False)

    def _store(self, memory: MemoryState) -> None:
        for kept, new in zip(self.memory, counted(memory), strict=True):
            if kept is not None:
                kept.copy_(new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys for a mask, as in the static softmax layers of the same cache."""
        return self.max_cache_len, 0

    def reset(self) -> None:
        """Forget everything, in place."""
        if self.memory is not None:
            for tensor in self.memory:
                if tensor is not None:
                    tensor.zero_()
        self.cumulative_length.zero_()
        self.has_previous_state[0] = False


def counted(memory: MemoryState) -> MemoryState:
    """The state with the number of tokens in the memory as a tensor."""
    if not isinstance(memory.count, int):
        return memory
    state = memory.state
    count = torch.full(state.shape[:1], max(memory.count, 0), dtype=torch.long, device=state.device)
    return memory._replace(count=count)


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> Cache:
    """
    Give a cache of Transformers the layers that GMA needs, in place, before its first token. A second call changes nothing.

    Args:
        cache (`Cache`): a `DynamicCache` or `StaticCache`, with or without a configuration.
        config (`GMAConfig`): the configuration of the model, which says which layers are GMA.

    Returns:
        `Cache`: the same object.

    Raises:
        ValueError: if a layer already holds the state of another model.
    """
    for layer_idx, layer_type in enumerate(config.layer_types):
        if layer_idx == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[layer_idx]
        if layer_type != "linear_attention" or isinstance(layer, GMACacheLayer):
            continue
        if getattr(layer, "is_initialized", False) or any(getattr(layer, "has_previous_state", {}).values()):
            raise ValueError(foreign_content(layer, layer_idx))
        if isinstance(cache, StaticCache):
            cache.layers[layer_idx] = StaticGMACacheLayer(_static_length(cache))
        else:
            cache.layers[layer_idx] = GMACacheLayer()
    return cache


def _static_length(cache: StaticCache) -> int:
    return max((getattr(layer, "max_cache_len", -1) for layer in cache.layers), default=-1)


def expect_continuation(
    cache: Cache | None, position_ids: torch.Tensor | None, padding_mask: torch.Tensor | None, batch_size: int
) -> None:
    """
    Check that the rows of a call go on from those of a cache: a position of 0, or one that the cache has passed, starts a row anew.

    Args:
        cache (`Cache`, *optional*): what the call goes on from.
        position_ids (`torch.Tensor` of shape `(batch or 1, length)`, *optional*): the positions that the user passed.
        padding_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at the real tokens of the call.
        batch_size (`int`): rows of the call.

    Raises:
        ValueError: if a row starts anew, or the cache has other rows.
    """
    layers = [] if cache is None else getattr(cache, "self_attention_cache", cache).layers
    layer = next((x for x in layers if isinstance(x, GMACacheLayer) and x.has_seen_tokens), None)
    if layer is None or is_tracing(layer.memory.state):
        return
    if layer.batch_size != batch_size:
        raise ValueError(
            f"The cache has {layer.batch_size} rows, but {batch_size} rows of tokens were given. `cache.batch_select_indices` and "
            "`cache.batch_repeat_interleave` choose and repeat rows."
        )
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 0:
        return
    memory, is_plain = layer.memory, type(layer) is GMACacheLayer and layer.num_plain == layer.cumulative_length
    # Of a cache without padding it is known how far it has come
    lowest = layer.num_plain if is_plain else 1
    if padding_mask is None:
        starts = position_ids[:, 0] < lowest
    else:
        positions = position_ids.expand(padding_mask.shape[0], -1).to(padding_mask.device)
        first = padding_mask.to(torch.uint8).argmax(dim=1, keepdim=True)
        starts = (positions.gather(1, first) < lowest)[:, 0] & padding_mask.any(dim=1)
    if not bool(starts.any()):
        return
    # In some rows, all tokens may have been padding
    seen = (memory.normalizer != 0).flatten(1).any(dim=1)
    if memory.valid is not None:
        seen = seen | memory.valid.any(dim=1)
    if is_plain or bool((starts.to(seen.device) & seen).any()):
        raise ValueError(
            f"`position_ids` start at {int(position_ids[:, 0].min())}, but the cache has seen {int(cache.get_seq_length())} tokens of the "
            "same rows. `generate` with a cache takes the whole text: the tokens in the cache, and at least one new token after them. "
            "A prompt that is no longer than the cache starts anew. A new sequence needs a new cache. To continue the old sequence "
            "without `generate`, leave `position_ids` out, or continue them."
        )


def up_to_current(attention_mask: torch.Tensor | None, length: int, cache: Cache | None) -> torch.Tensor | None:
    """A 2D mask without what lies behind the current tokens, in a mask that is as long as a static cache."""
    cache = getattr(cache, "self_attention_cache", cache)
    if attention_mask is None or not isinstance(cache, StaticCache) or is_tracing(attention_mask):
        return attention_mask
    return (
        attention_mask[:, : int(cache.get_seq_length()) + length]
        if attention_mask.shape[1] > length
        else attention_mask
    )


def select_padding_mask(
    attention_mask: torch.Tensor | None, batch_size: int, length: int, cache: Cache | None = None
) -> torch.Tensor | None:
    """
    The part of a 2D attention mask that belongs to the current tokens.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, seen + length or length)`, *optional*): nonzero at real tokens.
        batch_size (`int`), length (`int`): of the current tokens.
        cache (`Cache`, *optional*): what the call goes on from.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`: `True` at real tokens; `None` if no token is padding.

    Raises:
        ValueError: for a mask of another shape, and for one that takes cached tokens back.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2:
        raise ValueError(
            f"GMA layers take a 2D attention mask of shape (batch, length) that marks padding, got shape {shape}. They cannot follow "
            "a mask per pair of tokens; for packed sequences pass `position_ids`, `seq_idx` or `cu_seq_lens_q`."
        )
    cache = getattr(cache, "self_attention_cache", cache)
    is_static = isinstance(cache, StaticCache)
    seen = 0 if cache is None or is_static else cache.get_seq_length()
    fits = shape[1] >= length if is_static else shape[1] in (length, seen + length)
    if shape[1] < length or (not is_tracing(attention_mask) and (shape[0] != batch_size or not fits)):
        raise ValueError(
            f"The attention mask has shape {shape}, but {batch_size} rows of {length} tokens were given, behind {seen} tokens in the "
            "cache. It must cover the current tokens, or the cached and the current tokens."
        )
    start = shape[1] - length
    padding_mask = attention_mask[:, start:] != 0
    # The checks read values, so they are left out of compiled and exported graphs
    if is_tracing(padding_mask):
        return padding_mask
    layers = [] if cache is None else cache.layers
    if start > 0 and any(type(x) is GMACacheLayer and x.num_plain == seen > 0 for x in layers):
        if bool((attention_mask != 0).all()):
            return None
        if not bool((attention_mask[:, :start] != 0).all()):
            raise ValueError(
                "The attention mask marks tokens as padding that the cache has read as text. A GMA layer cannot take tokens out of its "
                "memory. Pass the mask together with these tokens, or a mask of the current tokens alone."
            )
    return None if bool(padding_mask.all()) else padding_mask
