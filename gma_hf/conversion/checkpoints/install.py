# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Put mixtures into a model as its configuration says, and remove them. An error during a change leaves the model as it was.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...compat import attention_implementation, execution_device, set_attention_implementation
from ...modeling.layout import expect_whole_sequences
from ...parallel.context import current_context
from ..config import GMAConversionConfig
from ..runtime.attention import IMPLEMENTATION
from ..runtime.calls import begin_attention, models_around, rotary_function, watch_model
from ..runtime.layer import GMAConversion


def gma_layers(model: nn.Module) -> dict[str, GMAConversion]:
    """
    The children `gma` of the converted modules of a model.

    Args:
        model (`nn.Module`): a converted model, with or without adapters and wrappers around it.

    Returns:
        `dict[str, GMAConversion]`: from the names of the attention modules in `model` to their children `gma`, in the order
        of the model.

    Raises:
        ValueError: for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`gma_layers` takes a model, got {type(model).__name__}.")
    layers = {}
    for name, module in model.named_modules():
        if "gma" in dict(module.named_children()):
            # Adapters may wrap the layer; the last module inside of the wrapper is the trained one
            layers[name] = [inner for inner in module.gma.modules() if isinstance(inner, GMAConversion)][-1]
    return layers


def build_layers(model: PreTrainedModel, conversion: GMAConversionConfig) -> dict[nn.Module, GMAConversion]:
    """
    Build the mixtures of a model, without values, each on the device and in the dtype of its attention module. The model
    does not change.

    Args:
        model (`PreTrainedModel`): the model.
        conversion ([`GMAConversionConfig`]): which layers, and their options. Names that this head of the model does not
            have (for example the encoder of an encoder-decoder) are left out.

    Returns:
        `dict[nn.Module, GMAConversion]`: from the attention modules to their mixtures, in the order of the model.

    Raises:
        ValueError: if the model has none of the layers, but has the modules around them.
    """
    found = {name: find_module(model, name) for name in conversion.layers}
    if not any(found.values()):
        # A part of the model (for example the text encoder without the converted image encoder) has other modules at the top
        strange = [name for name in found if find_module(model, name.partition(".")[0]) is not None]
        if strange:
            raise ValueError(
                f"{type(model).__name__} has none of the layers that its configuration calls converted: {', '.join(strange)}. "
                "Restore the config.json that `save_pretrained` wrote."
            )
    layers = {}
    for name, module in found.items():
        if module is None or hasattr(module, "gma"):
            continue
        layer = GMAConversion(**conversion.layer_arguments(name))
        # Parameters on the meta device get their values from a checkpoint
        device, dtype = placement(module, model)
        layer.to(device="meta" if layer.mixture_norm.means.is_meta else device, dtype=dtype)
        layers[module] = layer.train(module.training)
    return layers


def attach_layers(model: PreTrainedModel, layers: dict[nn.Module, GMAConversion]) -> None:
    """Let attention modules of a model compute with their mixtures, see [`build_layers`]."""
    views = {}
    for module, layer in layers.items():
        module.gma = layer
        # Looked up here, because a compiler cannot look into `sys.modules`
        module.gma_rotary = rotary_function(module) if layer.rotary_dim > 0 else None
        module.softmax_config = module.config
        if id(module.config) not in views:
            views[id(module.config)] = converted_view(module.config)
        module.config = views[id(module.config)]
        module._gma_hooks = (module.register_forward_pre_hook(begin_attention, with_kwargs=True),)
    if layers:
        # The first layer is enough, and no part of the model can run without it
        first = next(iter(layers))
        first._gma_hooks = (*first._gma_hooks, first.register_forward_pre_hook(refuse_sharded_sequences))
    softmax_modules = {find_module(model, name) for name in model.config.gma["softmax_layers"]}
    for submodel, modules in models_around(model, list(layers)).items():
        has_softmax = any(module in softmax_modules for module in submodel.modules())
        submodel._gma_hooks = (watch_model(submodel, modules, has_softmax),)


def refuse_sharded_sequences(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the first converted module, see [`expect_whole_sequences`]."""
    if current_context() is None:
        expect_whole_sequences()


def install_layers(model: PreTrainedModel) -> None:
    """Give the attention modules named in `model.config.gma` their mixtures, without values."""
    attach_layers(model, build_layers(model, GMAConversionConfig.from_dict(model.config.gma)))


def remove_layers(model: nn.Module) -> None:
    """Undo [`install_layers`]."""
    for module in list(model.modules()):
        for hook in vars(module).pop("_gma_hooks", ()):
            hook.remove()
        # Also for a module whose mixtures a user has removed
        if hasattr(module, "softmax_config"):
            module.config = module.softmax_config
            for name in ("gma", "gma_rotary", "softmax_config"):
                if hasattr(module, name):
                    delattr(module, name)


def placement(module: nn.Module, model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the computation of a module. Quantized weights are stored in other dtypes."""
    parameters = list(module.parameters())
    device = execution_device(module if parameters else model)
    dtypes = (p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1)
    return device, next(dtypes, model.dtype)


def find_module(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The module with this name, relative to the base model."""
    try:
        return model.base_model.get_submodule(name)
    except AttributeError:
        return None


def converted_view(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration as converted modules see it."""
    view = copy.copy(config)
    set_attention_implementation(view, IMPLEMENTATION)
    return view


def use_linear_masks(model: PreTrainedModel) -> None:
    """
    Use masks of [`gaussian_mixture_mask`] wherever no softmax layer needs masks. `model._softmax_implementations` keeps the
    implementations of the softmax layers, in case they are restored.
    """
    softmax_modules = (find_module(model, name) for name in model.config.gma["softmax_layers"])
    needed = {id(module.config) for module in softmax_modules if module is not None}
    converted = (module for module in model.modules() if hasattr(module, "gma"))
    configs = {id(module.softmax_config): module.softmax_config for module in converted}
    model._softmax_implementations = []
    for config in configs.values():
        if id(config) not in needed:
            model._softmax_implementations.append((config, attention_implementation(config)))
            set_attention_implementation(config, IMPLEMENTATION)


def restore_softmax_implementations(model: PreTrainedModel) -> None:
    """Undo [`use_linear_masks`]."""
    for config, implementation in getattr(model, "_softmax_implementations", ()):
        set_attention_implementation(config, implementation)
    model._softmax_implementations = []


@contextmanager
def unchanged_on_error(model: PreTrainedModel) -> Iterator[None]:
    """
    Within this context, any error (also an interrupt by the keyboard) restores the class, the modules, the hooks, the
    attributes and the configuration of the model. The values of parameters are not restored, see [`values_kept_on_error`].
    """
    owners = [*model.modules(), *{id(config): config for config in model_configs(model)}.values()]
    saved = [(owner, type(owner), dict(vars(owner)), dictionaries(owner)) for owner in owners]
    try:
        yield
    except BaseException:
        for owner, owner_class, attributes, contents in saved:
            owner.__class__ = owner_class
            vars(owner).clear()
            vars(owner).update(attributes)
            # In place: the handles of hooks know the dictionaries that hold the hooks
            for name, content in contents.items():
                attributes[name].clear()
                attributes[name].update(content)
        raise


@contextmanager
def values_kept_on_error(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within this context, any error (also an interrupt by the keyboard) restores the values of the parameters."""
    parameters = list(parameters)
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        raise


def dictionaries(owner: Any) -> dict[str, dict]:
    """Copies of the attributes that are dictionaries: parameters, modules and hooks."""
    return {name: copy.copy(value) for name, value in vars(owner).items() if isinstance(value, dict)}


def held_configs(module: nn.Module) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The configurations among the attributes of a module, with the names of the attributes."""
    for name, value in list(vars(module).items()):
        if isinstance(value, PreTrainedConfig):
            yield name, value


def copied_configs(
    held: Iterable[tuple[nn.Module, str, PreTrainedConfig]],
) -> list[tuple[nn.Module, str, PreTrainedConfig]]:
    """The same attributes with copies of the configurations. One object, alone or inside of another, gets one copy."""
    copies: dict[int, Any] = {}
    return [(module, name, copy.deepcopy(config, copies)) for module, name, config in held]


def model_configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """Every configuration that a module of the model holds, with the configurations inside of them; some more than once."""
    for module in model.modules():
        for _, config in held_configs(module):
            yield from nested_configs(config)


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and the configurations inside of it."""
    yield config
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            yield from nested_configs(sub_config)
