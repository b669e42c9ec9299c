# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Watch the mixtures of a model during a forward pass: every `GMAMixture`, in any module, reports what it routes."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import execution_device
from ..modeling import GMAMemory, GMAMixture
from .errors import AnalysisError


# The positional arguments of a memory, and the keyword arguments that change its implied attention matrix
MEMORY_ARGUMENTS = ("mixture", "window", "query", "key", "value")
AFFINITY_ARGUMENTS = ("causal", "write_weight", "log_decay", "sequence_ids", "normalize", "delta_strength")
MEMORY_AFFINITY_ARGUMENTS = (
    *("layout", "causal", "normalize", "scaling", "routing_query", "routing_key", "weigh_by_routing"),
    *("write_weight", "log_decay", "decay_rate", "delta_strength", "softcap", "sinks"),
)


class MixtureCall(NamedTuple):
    """
    What one layer routes in one forward pass.

    Args:
        name (`str`): name of the mixture in `model.named_modules()`.
        mixture (`GMAMixture`): the mixture.
        query (`torch.Tensor` of shape `(batch, query_heads, length, routing_dim)`): queries.
        key (`torch.Tensor` of shape `(batch, key_value_heads, length, routing_dim)`): keys.
        real (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at tokens that write; `None` if all tokens
            write.
        affinity (`Callable`): returns the matrix that the attention of the layer implies.
    """

    name: str
    mixture: GMAMixture
    query: Tensor
    key: Tensor
    real: Tensor | None
    affinity: Callable[[], Tensor]


def expect_mixture(module: nn.Module) -> GMAMixture:
    """
    The mixture itself if an adapter has put a wrapper around it. The last mixture inside of the wrapper is the trained one.
    """
    return [inner for inner in module.modules() if isinstance(inner, GMAMixture)][-1]


class LayerResponsibilities(NamedTuple):
    """
    Responsibilities of one layer.

    Args:
        queries (`torch.Tensor` of shape `(batch, heads, length, components)`): responsibilities of the queries.
        keys (`torch.Tensor` of shape `(batch, heads, length, components)`): responsibilities of the keys.
    """

    queries: Tensor
    keys: Tensor


def find_mixtures(model: nn.Module) -> dict[str, GMAMixture]:
    """
    The mixtures of a model.

    Args:
        model (`nn.Module`): any PyTorch model.

    Returns:
        `dict[str, GMAMixture]`: the mixtures, by module name.

    Raises:
        AnalysisError: if the model has no mixture.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    mixtures = {name: module for name, module in modules if isinstance(module, GMAMixture)}
    if not mixtures:
        raise AnalysisError(
            f"{type(model).__name__} has no Gaussian mixture attention layers, so there are no responsibilities to "
            "analyse. Give a GMA model or a model whose attention was converted to GMA."
        )
    return mixtures


@contextmanager
def watch_mixtures(model: nn.Module, callback: Callable[[MixtureCall], None]) -> Iterator[None]:
    """Within the `with` block, call `callback` before each attention of a mixture of the model."""

    mixtures = find_mixtures(model)
    names = {mixture: name for name, mixture in mixtures.items()}
    running: list[GMAMemory] = []

    def call_back(call: MixtureCall, *modules: nn.Module | None) -> None:
        # Accelerate loads offloaded weights for the forward pass, and these hooks run before it
        with ExitStack() as stack:
            for module in modules:
                if isinstance(module, nn.Module):
                    stack.enter_context(align_module_device(module))
            callback(call)

    def before_memory(memory: GMAMemory, positional: tuple, named: dict) -> None:
        # The memory may pass delayed or invalid tokens to its mixture, so the tokens of the text are read from its own
        # arguments
        given = dict(zip(MEMORY_ARGUMENTS, positional, strict=False)) | named
        mixture, window, query, key = (given[name] for name in MEMORY_ARGUMENTS[:4])
        routed = [given.get("routing_query"), given.get("routing_key")]
        routed = [state if state is not None else default for state, default in zip(routed, (query, key), strict=True)]
        known = {name: given[name] for name in given if name in MEMORY_AFFINITY_ARGUMENTS}
        layout = given.get("layout")
        real = None if layout is None else layout.padding_mask
        running.append(memory)
        mixture = expect_mixture(mixture)
        affinity = partial(memory.affinity, mixture, window, query, key, **known)
        call_back(MixtureCall(names[mixture], mixture, *routed, real, affinity), mixture, window)

    def after_memory(memory: GMAMemory, positional: tuple, output: object) -> None:
        running.pop()

    def before_mixture(mixture: GMAMixture, positional: tuple, named: dict) -> None:
        if running:
            return
        given = dict(zip(("query", "key", "value"), positional, strict=False)) | named
        known = {name: given[name] for name in AFFINITY_ARGUMENTS if name in given}
        weight = given.get("write_weight")
        real = None if weight is None else (weight > 0).any(dim=1)
        affinity = partial(mixture.affinity, given["query"], given["key"], **known)
        call_back(MixtureCall(names[mixture], mixture, given["query"], given["key"], real, affinity), mixture)

    handles = [mixture.register_forward_pre_hook(before_mixture, with_kwargs=True) for mixture in mixtures.values()]
    for memory in model.modules():
        if isinstance(memory, GMAMemory):
            handles.append(memory.register_forward_pre_hook(before_memory, with_kwargs=True))
            handles.append(memory.register_forward_hook(after_memory, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """
    Let a model read one batch while others watch its mixtures.

    The model runs without its head, in evaluation mode, without a cache, uncompiled. The decoder of an encoder-decoder model
    reads the tokens of the encoder, unless the inputs contain decoder tokens. Afterwards the model is as before.
    """
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    accepted = inspect.signature(body.forward).parameters
    device = execution_device(model)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    if "decoder_input_ids" in accepted and "input_ids" in inputs and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
        if "attention_mask" in inputs and "decoder_attention_mask" in accepted:
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    training = [module for module in body.modules() if module.training]
    body.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            body(**inputs)
    finally:
        for module in training:
            module.training = True


def responsibilities(model: nn.Module, **inputs: Tensor) -> dict[str, LayerResponsibilities]:
    """
    All responsibilities of a short text. For a long text use [`collect_statistics`], which keeps sums only.

    Args:
        model (`nn.Module`): a model with Gaussian mixture attention, native or converted.
        inputs (`torch.Tensor`, *optional*): the arguments of the model, as `tokenizer(text, return_tensors="pt")` returns
            them.

    Returns:
        `dict[str, LayerResponsibilities]`: responsibilities of queries and keys, by module name, on the device of the model.
        Padding has responsibilities too, but never writes.

    Raises:
        AnalysisError: if the model has no Gaussian mixtures.
    """
    found: dict[str, LayerResponsibilities] = {}

    def keep(call: MixtureCall) -> None:
        found[call.name] = LayerResponsibilities(*map(call.mixture.responsibilities, (call.query, call.key)))

    with torch.no_grad(), watch_mixtures(model, keep):
        run(model, inputs)
    return found


def implied_affinity(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """
    The attention matrices that the Gaussian mixtures imply for a short text. `output_attentions=True` returns the same
    matrices.

    Unlike `output_attentions`, this function works in hybrids with any attention implementation of the softmax layers.

    Args:
        model (`nn.Module`): a model with Gaussian mixture attention, native or converted.
        inputs (`torch.Tensor`, *optional*): the arguments of the model, as `tokenizer(text, return_tensors="pt")` returns
            them.

    Returns:
        `dict[str, torch.Tensor]`: matrices of shape `(batch, query_heads, length, length)`, by module name. The rows of a
        normalised read (the paper's block) sum to 1. The rows of an un-normalised read (the gated block) sum to the
        accumulated weight.

    Raises:
        AnalysisError: if the model has no Gaussian mixtures.
    """
    found: dict[str, Tensor] = {}

    def keep(call: MixtureCall) -> None:
        found[call.name] = call.affinity()

    with torch.no_grad(), watch_mixtures(model, keep):
        run(model, inputs)
    return found
