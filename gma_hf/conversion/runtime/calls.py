# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the layers of a converted model know of a call. Nothing is kept on modules, so threads may share a model:

- Before a model runs, its hook computes the [`Layout`] of the tokens, and passes it to all layers as the keyword argument
  `gma_layout`, which the models of Transformers pass on.
- Before an attention module runs, its hook passes `gma_call` to the attention function, with values that the function does
  not get otherwise: the cache of the layer, the rotation of queries and keys, and whether attentions are requested.

The states of converted layers are in the caches of Transformers. The code of the model still calls `cache.update(keys,
values, layer_idx)` before its attention. A converted layer returns the new keys and values unchanged. Its state advances
after the attention function has computed it.

Positions: softmax over rotated queries and keys depends only on the distance of two tokens. So models with RoPE may count
padding and other sequences like tokens. A mixture that routes rotated vectors depends on the position: it needs the number
of real tokens of its sequence before a token, as `generate` gives it. So when a call gives a padding mask or packed
sequences, but no positions, the hook counts the positions.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import is_tracing

from ...cache_argument import CACHE_NAME, OLD_CACHE_NAME, expect_known_cache, foreign_content, keep_one_name
from ...compat import attention_implementation, collected_outputs, function_of_modeling_file
from ...modeling.cache_gma import (
    GMACacheLayer,
    StaticGMACacheLayer,
    expect_continuation,
    select_padding_mask,
    up_to_current,
)
from ...modeling.layout import (
    Layout,
    count_positions,
    expect_tokens,
    find_sequence_ids,
    same_sequence_mask_function,
)
from ...modeling.memory_state import take_over
from ...ops.rotation.functional import Rotation
from ...parallel.context import current_context
from .masks import read_mask
from .parts import layout_of_part


class AttentionCall(NamedTuple):
    """What an attention module knows and its attention function does not."""

    cache_layer: GMACacheLayer | None = None  # the layer's part of the cache
    output_attentions: bool = False
    rotation: Rotation | None = None  # of the current tokens


class CallLayout:
    """
    The layout of one call of a model, for all of its layers.

    Args:
        layout ([`Layout`], *optional*): the layout that the arguments of the model give; `None` if they have a mask of pairs
            of tokens. The layers then read the layout from this mask.
    """

    def __init__(self, layout: Layout | None):
        self.layout = layout
        self._read: dict[int, tuple[Any, Layout]] = {}

    def of(self, mask: Any, query: Tensor, cache_layer: GMACacheLayer | None, is_causal: bool) -> Layout:
        """
        The layout of a layer that got a mask. Each mask of pairs is read and checked once per call.

        Raises:
            ValueError: for a mask that a mixture cannot follow.
        """
        is_of_tokens = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and mask.dtype == torch.bool)
        if self.layout is not None and (is_of_tokens or self.layout.row is not None):
            return self.layout
        # A compiled graph with the id of a mask would serve this one mask only
        if torch.compiler.is_compiling():
            return self._read_layout(mask, query, cache_layer, is_causal)
        # The mask is kept as long as its id is used
        known = self._read.get(id(mask))
        if known is None:
            known = self._read[id(mask)] = mask, self._read_layout(mask, query, cache_layer, is_causal)
        return known[1]

    def _read_layout(self, mask: Any, query: Tensor, cache_layer: GMACacheLayer | None, is_causal: bool) -> Layout:
        padding_mask, sequence_ids = read_mask(mask, query, cache_layer, is_causal)
        if self.layout is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return self.layout
        return Layout(query.shape[0], query.shape[2], padding_mask, sequence_ids)


def arguments(model: PreTrainedModel) -> list[str]:
    """Names of the arguments of the forward pass."""
    parameters = inspect.signature(model.forward).parameters
    return [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]


def models_around(model: PreTrainedModel, converted: list[nn.Module]) -> dict[PreTrainedModel, list[nn.Module]]:
    """The innermost models that contain converted modules and take tokens and an attention mask, with these modules."""
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    # From the outside to the inside, so that the innermost model around a module is the last
    innermost = {module: submodel for submodel in submodels for module in submodel.modules()}
    found: dict[PreTrainedModel, list[nn.Module]] = {}
    for module in converted:
        found.setdefault(innermost[module], []).append(module)
    return {submodel: modules for submodel, modules in found.items() if "attention_mask" in arguments(submodel)}


def watch_model(model: PreTrainedModel, converted: list[nn.Module], has_softmax: bool) -> RemovableHandle:
    """Register the hook of a model."""
    names = arguments(model)
    counts_positions = "position_ids" in names and any(
        "rotary" in type(module).__name__.lower() for module in model.modules()
    )
    is_causal = any(module.gma.is_causal for module in converted)
    windows = (module.gma.window_norm for module in converted if module.gma.window_norm is not None)
    sizes = tuple(sorted({(window.window_size, window.num_sink_tokens) for window in windows}))
    parameters = inspect.signature(model.forward).parameters.values()
    takes_layout = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    # No nested function and no module, because models are pickled and copied with their hooks
    hook = partial(begin_call, names, takes_layout, counts_positions, has_softmax, is_causal, sizes)
    return model.register_forward_pre_hook(hook, with_kwargs=True)


def begin_call(
    names: list[str],
    takes_layout: bool,
    counts_positions: bool,
    has_softmax: bool,
    is_causal: bool,
    windows: tuple[tuple[int, int], ...],
    model: PreTrainedModel,
    args: tuple,
    kwargs: dict,
) -> tuple[tuple, dict]:
    """The forward pre-hook of a model, with the values that [`watch_model`] looked up."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    keep_one_name(given)
    others = {name: value for name, value in given.items() if not takes_as_cache(names, name)}
    expect_known_cache(given.get(CACHE_NAME, given.get(OLD_CACHE_NAME)), others)
    given = begin_model(model, given, counts_positions, "position_ids" in names, has_softmax, is_causal, windows)
    if not takes_layout:
        if current_context() is not None:
            raise ValueError(
                f"{type(model).__name__} does not pass further arguments on to its attention layers, which context parallelism "
                "needs. Use data parallelism."
            )
        given.pop("gma_layout")
    return (), given


def takes_as_cache(names: list[str], name: str) -> bool:
    """
    Whether a model whose `forward` has the arguments `names` reads an argument as its cache, under this name or the new
    name.
    """
    return name in names or (name == OLD_CACHE_NAME and CACHE_NAME in names)


def cache_of(given: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a model. Its name depends on the version of Transformers that the model was written for."""
    return next((value for value in given.values() if isinstance(value, Cache)), None)


def begin_model(
    model: PreTrainedModel,
    given: dict[str, Any],
    counts_positions: bool,
    takes_positions: bool,
    has_softmax: bool,
    is_causal: bool,
    windows: tuple[tuple[int, int], ...],
) -> dict[str, Any]:
    """
    The arguments of a model, with the layout of its tokens, and with positions and masks that keep packed sequences apart.
    """
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and tokens is not None and mask.ndim not in (2, 4):
        raise ValueError(
            f"GMA layers understand attention masks of shape (batch, length) or (batch, 1, length, length), got {tuple(mask.shape)}."
        )
    if tokens is None or tokens.ndim < 2 or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        if current_context() is not None:
            raise ValueError(
                "Under context parallelism a converted model takes tokens and a 2D attention mask of shape (batch, length)."
            )
        return {**given, "gma_layout": CallLayout(None)}
    cache = cache_of(given)
    if current_context() is None:  # the part of a process may have no tokens
        expect_tokens(tokens, tokens.ndim, cache)  # choices of one text are a further dimension
    (batch_size, length), device = tokens.shape[:2], tokens.device
    seen_tokens = cache.get_seq_length() if cache is not None else 0
    if isinstance(getattr(cache, "self_attention_cache", cache), StaticCache) and not isinstance(seen_tokens, Tensor):
        # Masks may be as long as the cache
        seen_tokens = torch.tensor(seen_tokens)
    padding_mask = None
    if mask is not None:
        mask = up_to_current(mask.to(device), length, cache)
        padding_mask = select_padding_mask(mask, batch_size, length, cache)
    announced = position_ids if position_ids is not None and position_ids.ndim == 2 else None
    context = current_context()
    if context is not None:
        layout = layout_of_part(
            context,
            model,
            given,
            tokens,
            padding_mask,
            announced,
            cache,
            counts_positions,
            takes_positions,
            has_softmax,
        )
        return {**given, "gma_layout": CallLayout(layout)}
    seq_idx, cu_seq_lens = given.get("seq_idx"), given.get("cu_seq_lens_q")
    sequence_ids = find_sequence_ids(batch_size, length, padding_mask, announced, seq_idx, cu_seq_lens)
    if is_causal:
        expect_continuation(cache, announced, padding_mask, batch_size)
    is_told = mask is not None or seq_idx is not None or cu_seq_lens is not None
    if counts_positions and position_ids is None and is_told:
        given["position_ids"] = count_positions(batch_size, length, device, mask, sequence_ids, seen_tokens)
    if sequence_ids is not None and has_softmax:
        given["attention_mask"] = softmax_masks(model, given, padding_mask, sequence_ids, seen_tokens, is_causal)
    layout = Layout(batch_size, length, padding_mask, sequence_ids)
    if is_tracing(tokens):
        dtype = torch.promote_types(model.dtype, torch.float32)
        layout.complete(list(windows), is_causal, dtype, device, cache is not None)
    given["gma_layout"] = CallLayout(layout)
    return given


def softmax_masks(
    model: PreTrainedModel,
    given: dict[str, Any],
    padding_mask: Tensor | None,
    sequence_ids: Tensor,
    seen_tokens: Any,
    is_causal: bool,
) -> Any:
    """
    Masks that keep packed sequences apart in the remaining softmax layers. Transformers makes such masks only for calls
    without a cache and without a mask.

    Raises:
        ValueError: if such masks are not possible.
    """
    if "flash" in (attention_implementation(model.config) or ""):
        if padding_mask is not None:
            raise ValueError(
                "Flash attention in the softmax layers takes packed sequences without padding only. Leave the padding out, or "
                "load the model with `attn_implementation='sdpa'`."
            )
        return None
    if not is_causal:
        raise ValueError(
            "The softmax layers of this encoder would mix the packed sequences. Convert all of its layers, pass one sequence per "
            "row, or pass a mask of shape (batch, 1, length, length)."
        )
    if not isinstance(seen_tokens, Tensor) and seen_tokens > 0:
        raise ValueError(
            "Softmax layers cannot go on from a cache with several packed sequences per row. Pass one sequence per row, or start "
            "with a new cache."
        )
    tokens = given.get("inputs_embeds")
    if tokens is None:
        tokens = torch.empty(*sequence_ids.shape, 1, dtype=model.dtype, device=sequence_ids.device)
    return create_masks_for_generate(
        model.config,
        tokens,
        given.get("attention_mask"),
        cache_of(given),
        and_mask_function=same_sequence_mask_function(sequence_ids),
    )


def begin_attention(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """
    Forward pre-hook of a converted attention module: gives its attention function the values that it does not get otherwise.
    """
    cache = next((argument for argument in (*args, *kwargs.values()) if isinstance(argument, Cache)), None)
    cache_layer = None if cache is None else converted_cache_layer(cache, module.layer_idx)
    if cache_layer is not None:
        if not is_tracing():
            take_over([cache_layer], module, f"a converted model with {type(module).__name__}")
        cache_layer.is_expected = True
    # Some models pass `output_attentions` to their attention; others rely on the code that collects outputs
    output_attentions = bool(kwargs.get("output_attentions")) or any(
        "attentions" in name for name in collected_outputs()
    )
    embeddings = find_position_embeddings(args, kwargs) if module.gma_rotary is not None else None
    rotation = None if embeddings is None else Rotation(module.gma_rotary, *embeddings)
    return args, {**kwargs, "gma_call": AttentionCall(cache_layer, output_attentions, rotation)}


def converted_cache_layer(cache: Cache, layer_idx: int) -> GMACacheLayer:
    """
    The state of layer `layer_idx`. If the cache has no such state yet, it is added.

    Args:
        cache (`Cache`): the cache of the call.
        layer_idx (`int`): index of the layer in the cache.

    Raises:
        ValueError: if the layer of the cache already has keys and values.
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


def rotary_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The `apply_rotary_pos_emb` of the modeling file of a module; `None` if there is none."""
    return function_of_modeling_file(module, "apply_rotary_pos_emb")


def find_position_embeddings(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines among the arguments of an attention module."""
    for argument in (kwargs.get("position_embeddings"), *args):
        if isinstance(argument, tuple | list) and len(argument) == 2 and all(isinstance(x, Tensor) for x in argument):
            return tuple(argument)
    return None
