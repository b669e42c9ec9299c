# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Find the attention of a model: one forward pass over a few made-up tokens, with an attention implementation that records its
callers and their arguments, and returns zeros.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask

from ..compat import execution_device, set_attention_implementation
from ..ops.rotation.functional import Rotation, is_close, slow_columns
from .checkpoints.install import copied_configs, held_configs, nested_configs
from .runtime.calls import find_position_embeddings, rotary_function
from .runtime.masks import MASKED


PROBE = "gma_probe"
# The watcher of the forward pass that runs in this thread
_watcher: ContextVar[Callable[..., tuple[Tensor, None]]] = ContextVar("gma_probe")
# Encoder and decoder get different lengths, so that cross-attention differs from self-attention
ENCODER_LENGTH, DECODER_LENGTH = 7, 5


@dataclass
class AttentionLayer:
    """
    An attention module of a model, as the forward pass showed it.

    Args:
        name (`str`): name relative to the base model.
        full_name (`str`): name in the model.
        module (`nn.Module`): the module.
        num_heads, num_key_value_heads, routing_dim, value_dim (`int`): shapes of queries, keys and values.
        is_causal (`bool`): whether a token sees the tokens before it only.
        is_self_attention (`bool`): whether queries and keys come from the same tokens.
        rotary_dim (`int`): how many of the first dimensions have a rotation that can be undone, see [`find_rotary_dim`].
        rotation (`tuple[torch.Tensor, torch.Tensor]` or `None`): the cosines and sines of the rotation.
        undone_columns (`list[tuple[int, int]]`): the ranges of their columns that will be undone.
        obstacles (`list[str]`): why the module cannot be converted; empty if it can.
    """

    name: str
    full_name: str
    module: nn.Module
    num_heads: int
    num_key_value_heads: int
    routing_dim: int
    value_dim: int
    is_causal: bool
    is_self_attention: bool
    rotary_dim: int = 0
    rotation: tuple[Tensor, Tensor] | None = None
    undone_columns: list[tuple[int, int]] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    def shapes(self) -> dict[str, Any]:
        """The arguments of [`GMAConversion`] that the model decides."""
        names = ("num_heads", "num_key_value_heads", "routing_dim", "value_dim", "is_causal", "rotary_dim")
        names = (*names, "undone_columns") if self.rotary_dim > 0 else names
        return {name: getattr(self, name) for name in names}

    def choose_rotations(self, wavelength: float) -> None:
        """Undo the rotations that need more than this number of tokens for a full turn; if there are none, undo nothing."""
        if self.rotary_dim > 0:
            self.undone_columns = slow_columns(*self.rotation, wavelength)
            self.rotary_dim = self.rotary_dim if self.undone_columns else 0


def find_attention_layers(
    model: PreTrainedModel, example_inputs: dict[str, Any] | None = None
) -> list[AttentionLayer]:
    """
    The modules of a model that compute attention through the attention interface of Transformers.

    Args:
        model (`PreTrainedModel`): the model. It does not change.
        example_inputs (`dict`, *optional*): arguments for the forward pass of the base model, if made-up tokens, pixels or
            audio features do not work.

    Returns:
        `list[AttentionLayer]`: the modules, in the order of the model.

    Raises:
        ValueError: if the forward pass fails.
    """
    base_model = model.base_model
    names = {module: name for name, module in base_model.named_modules()}
    full_names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, AttentionLayer] = {}
    calls: Counter[nn.Module] = Counter()
    states: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
        calls[module] += 1
        states[module] = query, key
        if module in names and module not in found:
            module_names = names[module], full_names[module]
            found[module] = describe(*module_names, module, query, key, value, attention_mask, kwargs)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    # Some base models (separate decoders of encoder-decoder models) do not name their inputs
    runner = base_model if input_names(base_model) else model
    with probing(model, watch), recorded_arguments(base_model) as arguments:
        try:
            if example_inputs is None:
                run_with_dummies(runner)
            else:
                runner(**example_inputs)
        except Exception as error:
            inputs = sorted(input_names(runner) if example_inputs is None else example_inputs)
            raise ValueError(
                f"The attention of {type(model).__name__} could not be found: a forward pass over {inputs} failed with "
                f"{type(error).__name__}: {error}. Give arguments that it takes as `example_inputs`, for example "
                "`example_inputs=dict(tokenizer('A sentence.', return_tensors='pt'))`."
            ) from error
        for layer in found.values():
            layer.obstacles.extend(cache_obstacles(model, layer, calls[layer.module]))
            if layer.is_self_attention and layer.module in arguments:
                module = layer.module
                layer.rotation = find_position_embeddings(*arguments[module])
                layer.rotary_dim = find_rotary_dim(module, *arguments[module], states[module], states)
    return [found[module] for module in names if module in found]


def find_rotary_dim(
    module: nn.Module, args: tuple, kwargs: dict, states: tuple[Tensor, Tensor], watched: dict[nn.Module, tuple]
) -> int:
    """
    How many of the first dimensions of queries and keys have a rotation that [`Rotation.undo`] undoes. The module is called
    once more without a rotation: undoing has to give the result of this call.

    Args:
        module (`nn.Module`): the attention module.
        args (`tuple`), kwargs (`dict`): the arguments of its call.
        states (`tuple[Tensor, Tensor]`): the query and key that its attention function got in this call.
        watched (`dict`): from a module to the query and key of its latest call, filled during the calls.

    Returns:
        `int`: the number of dimensions; 0 if the module rotates nothing, or in another way.
    """
    embeddings, rotate = find_position_embeddings(args, kwargs), rotary_function(module)
    if embeddings is None or rotate is None:
        return 0
    nothing = (torch.ones_like(embeddings[0]), torch.zeros_like(embeddings[1]))

    def replace(argument: Any) -> Any:
        if isinstance(argument, Cache):
            return None
        return argument if find_position_embeddings((argument,), {}) is None else nothing

    # Ignore failures: the model may reject these inputs
    with suppress(Exception):
        module(*map(replace, args), **{name: replace(argument) for name, argument in kwargs.items()})
    plain = watched[module]
    if all(torch.equal(x, y) for x, y in zip(plain, states, strict=True)):
        return 0
    # Some functions take cosines for every dimension, some for every pair of dimensions
    for rotary_dim in (embeddings[0].shape[-1], 2 * embeddings[0].shape[-1]):
        with suppress(Exception):
            undone = Rotation(rotate, *embeddings).undo(*states, rotary_dim)
            if rotary_dim <= states[0].shape[-1] and all(map(is_close, undone, plain)):
                return rotary_dim
    return 0


def describe(
    name: str,
    full_name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> AttentionLayer:
    """What one call of the attention function shows about its module."""
    is_self_attention = query.shape[0] == key.shape[0] and query.shape[2] == key.shape[2]
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    obstacles = []
    # The masks of the probe are the same for all heads
    is_biased = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1
    if isinstance(mask, Tensor) and mask.ndim == 4 and is_self_attention and mask.shape[-1] > 1:
        is_causal = not bool((mask[0, 0, 0, 1:] if mask.dtype == torch.bool else mask[0, 0, 0, 1:] > MASKED).any())
        is_biased |= mask.dtype != torch.bool and bool(((mask != 0) & (mask > MASKED)).any())
    if is_biased or kwargs.get("position_bias") is not None:
        obstacles.append("it adds a position bias to its attention scores, which a mixture does not have")
    if query.shape[1] % key.shape[1] != 0:
        obstacles.append(f"its {query.shape[1]} query heads are no multiple of its {key.shape[1]} key heads")
    if query.shape[3] != key.shape[3]:
        obstacles.append("its queries and keys have different dimensions")
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        obstacles.append("it does not take its attention implementation from its own configuration")
    return AttentionLayer(
        name=name,
        full_name=full_name,
        module=module,
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        routing_dim=query.shape[3],
        value_dim=value.shape[3],
        is_causal=bool(is_causal),
        is_self_attention=is_self_attention,
        obstacles=obstacles,
    )


def cache_obstacles(model: PreTrainedModel, layer: AttentionLayer, num_calls: int) -> list[str]:
    """Why the state of GMA cannot replace the cache of a causal layer."""
    if not layer.is_causal or not layer.is_self_attention:
        return []
    index = getattr(layer.module, "layer_idx", None)
    if index is None:
        # Text encoders may be causal and never see a cache
        return ["it has no `layer_idx` that tells its place in a cache"] if model.can_generate() else []
    if getattr(layer.module.config, "num_kv_shared_layers", 0):
        return ["layers of this model share their keys and values"]
    if num_calls > 1:
        return ["it computes several attentions in one forward pass"]
    cache_layers = DynamicCache(config=model.config).layers
    if index >= len(cache_layers) or type(cache_layers[index]) in (DynamicLayer, DynamicSlidingWindowLayer):
        return []
    return [f"in a cache it keeps other things than keys and values, in a {type(cache_layers[index]).__name__}"]


def watched_attention(*args, **kwargs) -> tuple[Tensor, None]:
    """The attention function for discovery: the watcher of the forward pass of this thread."""
    return _watcher.get()(*args, **kwargs)


def full_mask(*args, allow_is_causal_skip=True, allow_is_bidirectional_skip=False, **kwargs) -> Tensor:
    """A mask of all pairs, even if softmax would need none."""
    return sdpa_mask(*args, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs)


# For all instances of the interfaces, because some models have their own instance, and without removing it again, because
# conversions in other threads use the same name
AttentionInterface.register(PROBE, watched_attention)
AttentionMaskInterface.register(PROBE, full_mask)


@contextmanager
def probing(model: PreTrainedModel, watch: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """
    Within this context: evaluation mode, no gradients, and a watched attention implementation in the whole model. The model
    works on copies of its configurations, because models in other threads may share the configurations.
    """
    originals = [(module, name, value) for module in model.modules() for name, value in held_configs(module)]
    training = {module: module.training for module in model.modules()}
    token = _watcher.set(watch)
    try:
        for module, name, config in copied_configs(originals):
            vars(module)[name] = config
            for nested in nested_configs(config):
                set_attention_implementation(nested, PROBE)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        _watcher.reset(token)
        for module, name, config in originals:
            vars(module)[name] = config
        for module, was_training in training.items():
            module.training = was_training


@contextmanager
def recorded_arguments(model: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple, dict]]]:
    """The arguments of the last call of each module, filled during the calls."""
    arguments: dict[nn.Module, tuple[tuple, dict]] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments[module] = args, kwargs

    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
        yield arguments
    finally:
        for handle in handles:
            handle.remove()


def input_names(model: PreTrainedModel) -> set[str]:
    """The inputs of a forward pass that can be made up."""
    names = {"input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids"}
    return names & set(inspect.signature(model.forward).parameters)


def run_with_dummies(model: PreTrainedModel) -> None:
    """
    A forward pass over made-up inputs. Models of images and text need inputs that fit each other, so each part of such a
    model runs alone. A part that cannot run alone is not seen, and stays as it is.
    """
    inputs = dummy_inputs(model)
    try:
        model(**inputs)
    except Exception:
        if not {"input_ids", "pixel_values"} <= inputs.keys():
            raise
        inputs.pop("pixel_values")
        model(**inputs)
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and input_names(part) == {"pixel_values"}:
                with suppress(Exception):
                    part(**dummy_inputs(part))


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tokens, pixels and audio features for a model, under the names of its forward pass."""
    config, names = model.config, input_names(model)
    device, dtype = execution_device(model), model.dtype
    inputs = {}
    if "input_ids" in names:
        inputs["input_ids"] = dummy_tokens(config.get_text_config(), ENCODER_LENGTH, device)
    if "pixel_values" in names:
        inputs["pixel_values"] = torch.zeros(pixel_shape(config), device=device, dtype=dtype)
    if "input_features" in names:
        # Two frames per position, as in encoders like Whisper's
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.zeros(shape, device=device, dtype=dtype)
    if "input_values" in names:
        inputs["input_values"] = torch.zeros(1, 16000, device=device, dtype=dtype)
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = dummy_tokens(config.get_text_config(decoder=True), DECODER_LENGTH, device)
    return inputs


def dummy_tokens(config: PreTrainedConfig, length: int, device: torch.device) -> Tensor:
    """Tokens, none of which is padding."""
    words = [word for word in range(config.vocab_size) if word != getattr(config, "pad_token_id", None)]
    return torch.tensor([words[i % len(words)] for i in range(3, 3 + length)], device=device)[None]


def pixel_shape(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """The shape of one image, from the configuration of the model or of its vision part."""
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return 1, getattr(config, "num_channels", 3), height, width
