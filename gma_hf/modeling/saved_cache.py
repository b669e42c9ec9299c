# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The state of a model in a file: read a long prompt once, and continue it many times. The file contains the shapes of every
layer and a fingerprint of the weights, so every other model is refused.
"""

import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..configuration import GMAConfig
from .cache_gma import GMACacheLayer, adopt_cache
from .memory_state import NATIVE, MemoryState, Owner, expect_fingerprint, fingerprint_of


FORMAT = "gma_hf.cache"


def base_model_of(model: Any) -> nn.Module:
    """The `GMAModel` of a native model."""
    base_model = getattr(model, "base_model", None)
    if not isinstance(getattr(model, "config", None), GMAConfig) or base_model is None:
        raise ValueError(
            f"Caches of {type(model).__name__} cannot be saved or loaded: only native GMA models (`GMAForCausalLM`, "
            "`GMAModel`) have caches in files. Keep the cache of a converted model in memory (`copy.deepcopy`)."
        )
    return base_model


def save_cache(cache: DynamicCache, path: str | os.PathLike, model: nn.Module | None = None) -> None:
    """
    Write the state of a native model, for example after a long prompt, to a safetensors file.

    Args:
        cache (`DynamicCache`): the cache that a model returned.
        path (`str` or `os.PathLike`): the file, conventionally `*.safetensors`.
        model (`PreTrainedModel`, *optional*): the model that filled the cache. By default the cache knows its model, as long
            as the model exists and the cache was not pickled.

    Raises:
        ValueError: if the cache is empty, static, quantized, or belongs to a converted model, or if its model is unknown.
    """
    expect_path(path)
    layers = getattr(cache, "layers", None)
    # Layers that no GMA model has used yet have fewer attributes
    if not layers or not any(getattr(layer, "is_initialized", False) for layer in layers):
        raise ValueError(
            "The cache is empty, or no GMA model filled it: run the GMA model on a prompt with `use_cache=True` first."
        )
    if model is None:
        owners = [layer.owner.model() for layer in layers if isinstance(layer, GMACacheLayer)]
        model = owners[0] if owners else None
        if model is None:
            raise ValueError(
                "It is unknown which model filled the cache: the model was deleted, or the cache was pickled, or a converted "
                "model filled it, whose caches cannot be saved. Pass the native GMA model as `model=`."
            )
    base_model = base_model_of(model)
    tensors, stored = {}, set()
    metadata = {"format": FORMAT, "seq_length": str(cache.get_seq_length()), "num_layers": str(len(layers))}
    for layer_idx, layer in enumerate(layers):
        if type(layer) is GMACacheLayer:
            named = layer.memory._asdict()
        elif type(layer) is DynamicLayer:
            named = {"keys": layer.keys, "values": layer.values}
        else:
            raise ValueError(
                f"Layer {layer_idx} of the cache is a {type(layer).__name__}. Only a `DynamicCache` can be saved: "
                "process the prompt without `cache_implementation`."
            )
        for name, value in named.items():
            if isinstance(value, Tensor):
                tensor = value.detach().contiguous()
                # Layers that saw the same tokens share their masks, but a file holds every tensor once
                memory = tensor.untyped_storage().data_ptr()
                tensors[f"layers.{layer_idx}.{name}"] = tensor.clone() if memory in stored else tensor
                stored.add(memory)
            elif value is not None:
                metadata[f"layers.{layer_idx}.{name}"] = str(value)
    expect_finite(tensors, "The cache")
    metadata["fingerprint"] = fingerprint_of(base_model) or ""
    temporary = f"{path}.unfinished"
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_cache(
    path: str | os.PathLike, config: PreTrainedConfig | nn.Module, device: str | torch.device = "cpu"
) -> DynamicCache:
    """
    Read a state that [`save_cache`] wrote. To continue it several times, use `copy.deepcopy(cache)` or
    `cache.batch_repeat_interleave(n)`.

    Args:
        path (`str` or `os.PathLike`): the file.
        config (`GMAConfig` or `PreTrainedModel`): the model that will continue from the cache, or its configuration. With a
            configuration, the weights are compared when a model first uses the cache.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): the device of the tensors.

    Returns:
        `DynamicCache`: the cache. Pass it to the model, or to `generate`, as `cache` (before Transformers 5.24:
        `past_key_values`).

    Raises:
        ValueError: if the file is no such state, or does not fit the model.
    """
    model = None
    if isinstance(config, nn.Module):
        model = base_model_of(config)
        config = config.config
    if not isinstance(config, GMAConfig):
        raise ValueError(
            f"`load_cache` takes a native GMA model or its `GMAConfig`, got {type(config).__name__}. Pass the model that will continue "
            "from the cache."
        )
    expect_path(path)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must name a device, such as 'cpu' or 'cuda', got {device!r}.") from error
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}. Write it again.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no cache of a GMA model. Write one with `gma_hf.save_cache`.")
    seq_length, num_layers = (number_in(metadata, name, path) for name in ("seq_length", "num_layers"))
    if num_layers != config.num_hidden_layers:
        raise ValueError(
            f"{path} does not fit the model: the file has {num_layers} layers, the model has {config.num_hidden_layers}. Load the "
            "cache with the model that filled it, or process the prompt again."
        )
    expect_finite(tensors, str(path))
    fingerprint = metadata.get("fingerprint") or None
    if model is not None and fingerprint is not None:
        expect_fingerprint(model, fingerprint, str(path))
        fingerprint = None
    cache = adopt_cache(DynamicCache(config=config), config)
    for layer_idx, layer in enumerate(cache.layers):
        prefix = f"layers.{layer_idx}."
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        is_gma = isinstance(layer, GMACacheLayer)
        expect_shapes(named, expected_shapes(config, is_gma, seq_length), layer_idx, path)
        if not is_gma:
            layer.update(named["keys"], named["values"])
            continue
        if f"{prefix}count" in metadata:
            named["count"] = number_in(metadata, f"{prefix}count", path, lowest=-(2**62))
        layer.advance(MemoryState(**named), seq_length)
        layer.owner = Owner(model, fingerprint, NATIVE)
    return cache


def expect_path(path: Any) -> None:
    """
    Check the name of a cache's file.

    Raises:
        ValueError: for anything but a file, or a new file in a folder that exists.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"The path of a cache must be the name of a file, got {path!r}.")
    if os.path.isdir(path):
        raise ValueError(
            f"{path} is a folder. Give the file of the cache, for example `cache.safetensors` in the folder."
        )
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder} for the file of the cache. Make the folder first.")


def number_in(metadata: dict[str, str], name: str, path: Any, lowest: int = 0) -> int:
    """A number in the metadata of a file."""
    try:
        number = int(metadata[name])
        if number < lowest:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(
            f"{path} is damaged, or from another version of gma_hf: its entry {name!r} is {metadata.get(name)!r}, expected a number "
            f"of at least {lowest}. Write the cache again."
        ) from None
    return number


def expect_finite(tensors: dict[str, Tensor], what: str) -> None:
    """
    Check for NaN and infinite numbers, which every further token would inherit.

    Raises:
        ValueError: if there are such numbers.
    """
    for name, tensor in tensors.items():
        # A logarithm of a decay may be -inf: everything before the token is forgotten
        bad = tensor.isnan() if name.endswith("log_decay") else ~tensor.isfinite()
        if tensor.is_floating_point() and bool(bad.any()):
            raise ValueError(f"{what} holds NaN or infinite numbers in {name!r}. Process the prompt again.")


def expected_shapes(config: GMAConfig, is_gma: bool, seq_length: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the state of a layer for one row, by name."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if not is_gma:
        return dict.fromkeys(("keys", "values"), (key_heads, seq_length, config.head_dim))
    shapes = {
        "state": (heads, config.num_components, config.head_dim),
        "normalizer": (heads, config.num_components),
    }
    if config.conv_kernel_size > 0:
        channels = (heads + key_heads) * config.routing_dim + key_heads * config.head_dim
        shapes["convolution"] = (config.conv_kernel_size - 1, channels)
    if config.window_size > 0:
        shapes["keys"] = (key_heads, config.window_size, config.routing_dim)
        shapes["values"] = (key_heads, config.window_size, config.head_dim)
        if config.use_write_weight:
            shapes["write_weight"] = (heads, config.window_size)
        if config.use_decay and not config.use_write_weight:
            shapes["log_decay"] = (heads, config.window_size)
    if config.window_size > 0 and config.num_sink_tokens > 0:
        shapes["sink_keys"] = (key_heads, config.num_sink_tokens, config.routing_dim)
        shapes["sink_values"] = (key_heads, config.num_sink_tokens, config.head_dim)
    return shapes


# These fields are missing if all tokens of all rows are known to exist
OPTIONAL = ("valid", "sink_valid", "count")


def expect_shapes(
    named: dict[str, Tensor], expected: dict[str, tuple[int, ...]], layer_idx: int, path: str | os.PathLike
) -> None:
    """
    Check that a layer of the file has the state that a layer of the model needs.

    Raises:
        ValueError: if it has not.
    """
    found = {name: tuple(tensor.shape[1:]) for name, tensor in named.items() if name not in OPTIONAL}
    if found == expected:
        return
    has, needs = kept_tokens(found), kept_tokens(expected)
    if has == needs:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        has, needs = ({name: shapes.get(name) for name in differing} for shapes in (found, expected))
        needs = f"{needs} (shapes per row; `None` for nothing)"
    raise ValueError(
        f"{path} does not fit the model: of layer {layer_idx} the file has {has}, the model needs {needs}. Load the cache with the "
        "model that filled it, or process the prompt again."
    )


def kept_tokens(shapes: dict[str, tuple[int, ...]]) -> str:
    """In words, how many tokens a layer keeps exactly."""
    window, sinks = (shapes[name][1] if name in shapes else 0 for name in ("keys", "sink_keys"))
    return f"a window of {window} tokens and {sinks} sink tokens"
