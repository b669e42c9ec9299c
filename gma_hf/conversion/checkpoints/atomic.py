# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""All or nothing: an error in the middle of a change leaves a model as it was before the change."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@contextmanager
def unchanged_on_error(model: PreTrainedModel) -> Iterator[None]:
    """
    Within the context, any error, an interrupt by the keyboard included, puts back the class, the modules, the hooks, the
    attributes and the configuration of the model. The values of parameters are not kept, see [`values_kept_on_error`].
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
    """Within the context, any error, an interrupt by the keyboard included, puts back the values of the parameters."""
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
    """The same with copies of the configurations. What was one object, alone or inside of another, is one copy."""
    copies: dict[int, Any] = {}
    return [(module, name, copy.deepcopy(config, copies)) for module, name, config in held]


def model_configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """Every configuration that some module of the model holds, those inside of others included; some more than once."""
    for module in model.modules():
        for _, config in held_configs(module):
            yield from nested_configs(config)


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            yield from nested_configs(sub_config)
