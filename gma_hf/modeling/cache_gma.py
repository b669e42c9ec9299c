# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a GMA layer remembers between forward passes: the sums S and z of the operator, the tokens that a softmax window
still sees, and the last inputs of the short convolution. Its size does not depend on how many tokens were seen.

The layer takes the place of Transformers' own recurrent layer in a `DynamicCache` or `StaticCache`, which counts no tokens,
cannot be repeated or selected along the batch, and would keep S and z in the model's dtype.
"""

import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
)
from transformers.utils import is_torchdynamo_compiling

from ..compat import mark_static_address
from ..ops.window.tokens import GMAWindowHistory


# The recurrent states of a cache layer are the fields of a `GMAWindowHistory`; without a window, its first two alone
STATE, NORMALIZER = 0, 1


class GMACacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """
    The state of one GMA layer in a `DynamicCache`.

    Attributes:
        recurrent_states (`dict[int, torch.Tensor]`): S `(batch, heads, components, head_dim)` and z
            `(batch, heads, components)`, in float32; with a softmax window also the tokens that are still in it, the
            sink tokens and how many tokens were summed, the further fields of [`GMAWindowHistory`].
        conv_states (`dict[int, torch.Tensor]`): at index 0, the last inputs of the short convolution
            `(batch, kernel_size - 1, channels)`, if the layer has one.
        cumulative_length (`int`): number of tokens seen.
    """

    is_compileable = False
    is_sliding = False
    # The sums cannot give a token back: no rollback
    is_croppable = False

    def __init__(self):
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=len(GMAWindowHistory._fields))
        # The attributes of a layer of keys and values, which generic code asks for
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    @property
    def has_seen_tokens(self) -> bool:
        """Whether there is something to go on from; after a reset a static cache holds zeros, which are nothing."""
        return self.is_initialized and all(self.has_previous_state.values())

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(S, z), or `None` before the first token."""
        if not self.has_seen_tokens:
            return None
        return self.recurrent_states[STATE], self.recurrent_states[NORMALIZER]

    @property
    def window_history(self) -> GMAWindowHistory | None:
        """What a layer with a softmax window goes on from, or `None` before the first token."""
        if not self.has_seen_tokens:
            return None
        return GMAWindowHistory(*self.recurrent_states.values())

    @property
    def conv_history(self) -> torch.Tensor | None:
        """The last inputs of the short convolution, or `None` before the first token or without convolution."""
        return self.conv_states[0]

    def update(
        self,
        state: tuple[torch.Tensor, torch.Tensor] | GMAWindowHistory,
        conv_history: torch.Tensor | None,
        num_tokens: int,
    ) -> None:
        """
        Replace the state by the one after `num_tokens` further tokens.

        Args:
            state (`tuple[torch.Tensor, torch.Tensor]` or `GMAWindowHistory`): the new S and z, or with a softmax window
                its whole history.
            conv_history (`torch.Tensor`, *optional*): the new last inputs of the short convolution.
            num_tokens (`int`): how many tokens were processed.
        """
        self.lazy_initialization(state, conv_history)
        for index, tensor in enumerate(state):
            if tensor is not None:
                self._store(self.recurrent_states, index, tensor)
        if conv_history is not None:
            self._store(self.conv_states, 0, conv_history)
        self.cumulative_length += num_tokens
        self.has_previous_state = dict.fromkeys(self.has_previous_state, True)

    def _store(self, states: dict[int, torch.Tensor], index: int, new_state: torch.Tensor):
        # A new tensor, not a copy into the old one: gradients may flow through a dynamic cache, from one segment to the
        # next. A clone, not a view: the last tokens of a long prompt would keep all of it in memory.
        states[index] = new_state.clone()

    def lazy_initialization(
        self, state: tuple[torch.Tensor, torch.Tensor] | GMAWindowHistory, conv_history: torch.Tensor | None = None
    ) -> None:
        if self.is_initialized:
            return
        self.device, self.dtype = state[STATE].device, state[STATE].dtype
        for index, tensor in enumerate(state):
            if tensor is not None:
                self.recurrent_states[index] = torch.zeros_like(tensor)
                self.is_recurrent_states_initialized[index] = True
        if conv_history is not None:
            self.conv_states[0] = torch.zeros_like(conv_history)
            self.is_conv_states_initialized[0] = True
        self.is_initialized = True

    def update_conv_state(self, *args, **kwargs):
        raise TypeError("A GMA layer updates its whole state at once: call `update`.")

    update_recurrent_state = update_conv_state

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover, as if all tokens seen were still there."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        """
        Raises:
            ValueError: unless no token is to be removed; a running sum cannot give a token back.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                "A GMA layer keeps running sums and cannot remove tokens from them. Copy the cache (`copy.deepcopy`) "
                "before the tokens that may have to be taken back."
            )

    def activate_past_recording(self) -> None:
        raise ValueError(
            "A GMA model cannot be rolled back, so it cannot serve as the assistant of assisted decoding."
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the beams to go on with."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        self._map_states(lambda states: states.index_select(0, indices.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times: one prompt, many continuations."""
        self._map_states(lambda states: states.repeat_interleave(repeats, dim=0))

    def _map_states(self, function):
        for states in (self.recurrent_states, self.conv_states):
            for index, tensor in states.items():
                if tensor is not None:
                    states[index] = function(tensor)


class StaticGMACacheLayer(GMACacheLayer):
    """
    The state of one GMA layer in a `StaticCache`: the same tensors live at the same addresses for good, and the number of
    tokens seen is a tensor too, so that compiled decoding never recompiles and CUDA graphs can be replayed.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.zeros((), dtype=torch.long)

    def lazy_initialization(
        self, state: tuple[torch.Tensor, torch.Tensor] | GMAWindowHistory, conv_history: torch.Tensor | None = None
    ) -> None:
        if self.is_initialized:
            return
        super().lazy_initialization(state, conv_history)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            for tensor in (*self.recurrent_states.values(), self.conv_states[0], self.cumulative_length):
                if tensor is not None:
                    mark_static_address(tensor)

    def _store(self, states: dict[int, torch.Tensor], index: int, new_state: torch.Tensor):
        states[index].copy_(new_state)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover: those of the static softmax layers beside this one."""
        return self.max_cache_len, 0

    def reset(self) -> None:
        """Forget everything, in place."""
        self._map_states(lambda states: states.zero_())
        self.cumulative_length.zero_()
        self.has_previous_state = dict.fromkeys(self.has_previous_state, False)


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> Cache:
    """
    Give a cache of Transformers the layers that GMA needs; in place, once, before its first token.

    Args:
        cache (`Cache`): a `DynamicCache` or `StaticCache`, with or without a config of its own.
        config (`GMAConfig`): says which layers are GMA.

    Returns:
        `Cache`: the same object.

    Raises:
        ValueError: if a layer already holds the state of some other model.
    """
    for layer_idx, layer_type in enumerate(config.layer_types):
        if layer_idx == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[layer_idx]
        if layer_type != "linear_attention" or isinstance(layer, GMACacheLayer):
            continue
        if getattr(layer, "is_initialized", False) or any(getattr(layer, "has_previous_state", {}).values()):
            raise ValueError(
                f"Layer {layer_idx} of the cache already holds a {type(layer).__name__} with content, but layer "
                f"{layer_idx} of the model is a GMA layer. Was the cache filled by another model?"
            )
        if isinstance(cache, StaticCache):
            cache.layers[layer_idx] = StaticGMACacheLayer(_static_length(cache))
        else:
            cache.layers[layer_idx] = GMACacheLayer()
    return cache


def _static_length(cache: StaticCache) -> int:
    return max((getattr(layer, "max_cache_len", -1) for layer in cache.layers), default=-1)


def save_cache(cache: DynamicCache, path: str | os.PathLike) -> None:
    """
    Write the state of a model, say after a long prompt, to a safetensors file.

    Args:
        cache (`DynamicCache`): as returned in `past_key_values`.
        path (`str` or `os.PathLike`): the file, conventionally `*.safetensors`.

    Raises:
        ValueError: for a cache that is empty, static or quantized.
    """
    tensors = {}
    for layer_idx, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            raise ValueError("The cache is empty: run the model on a prompt with `use_cache=True` first.")
        if type(layer) is GMACacheLayer:
            named = {**layer.window_history._asdict(), "conv": layer.conv_history}
        elif type(layer) is DynamicLayer:
            named = {"keys": layer.keys, "values": layer.values}
        else:
            raise ValueError(
                f"Layer {layer_idx} of the cache is a {type(layer).__name__}. Only a `DynamicCache` can be saved: "
                "process the prompt without `cache_implementation`."
            )
        for name, tensor in named.items():
            if tensor is not None:
                tensors[f"layers.{layer_idx}.{name}"] = tensor.detach().contiguous()
    save_file(tensors, path, metadata={"format": "gma_hf.cache", "seq_length": str(cache.get_seq_length())})


def load_cache(path: str | os.PathLike, config: PreTrainedConfig, device: str | torch.device = "cpu") -> DynamicCache:
    """
    Read a state written by [`save_cache`]. Fork it with `copy.deepcopy(cache)` or `cache.batch_repeat_interleave(n)`.

    Args:
        path (`str` or `os.PathLike`): the file.
        config (`GMAConfig`): of the model that goes on from it.
        device (`str` or `torch.device`): where to put the tensors.

    Returns:
        `DynamicCache`: to pass as `past_key_values`.

    Raises:
        ValueError: if the file is no such state, or does not fit the model.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("format") != "gma_hf.cache":
        raise ValueError(f"{path} holds no cache of a GMA model. Write one with `gma_hf.save_cache`.")
    cache = adopt_cache(DynamicCache(config=config), config)
    for layer_idx, layer in enumerate(cache.layers):
        named = {
            name.split(".")[-1]: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{layer_idx}.")
        }
        is_gma = isinstance(layer, GMACacheLayer)
        expected = {"state", "normalizer"} if is_gma else set()
        if not is_gma or config.window_size > 0:
            expected |= {"keys", "values"}
        if not expected <= named.keys():
            raise ValueError(
                f"{path} does not fit the model: layer {layer_idx} needs {sorted(expected)}, the file has {sorted(named)}."
            )
        if is_gma:
            shape = (config.num_attention_heads, config.num_components, config.head_dim)
            if tuple(named["state"].shape[1:]) != shape:
                raise ValueError(
                    f"{path} does not fit the model: the state of layer {layer_idx} has shape "
                    f"{tuple(named['state'].shape[1:])} per row, the model needs {shape}."
                )
            window_size, num_sinks = (named[x].shape[2] if x in named else 0 for x in ("keys", "sink_keys"))
            if (window_size, num_sinks) != (config.window_size, config.num_sink_tokens):
                raise ValueError(
                    f"{path} does not fit the model: layer {layer_idx} keeps a window of {window_size} tokens and "
                    f"{num_sinks} sink tokens, the model needs {config.window_size} and {config.num_sink_tokens}."
                )
            conv_history = named.pop("conv", None)
            states = [named.get(name) for name in GMAWindowHistory._fields]
            layer.update(states, conv_history, int(metadata["seq_length"]))
        else:
            layer.update(named["keys"], named["values"])
    return cache
