# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The teacher of a converted model. A converted model still contains the softmax of its original. So as long as only new
parameters are trained, the teacher needs no second model. Within [`as_teacher`], converted modules run their softmax, and a
callback can watch them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...compat import attention_implementation, function_of_modeling_file, set_attention_implementation
from ...ops.rotation.functional import Rotation
from ..checkpoints.install import gma_layers, restore_softmax_implementations, use_linear_masks
from ..runtime.attention import gma_attention_forward
from ..runtime.calls import AttentionCall, CallLayout
from ..runtime.layer import GMAConversion
from ..runtime.masks import read_mask


TEACHER_IMPLEMENTATION = "gma_teacher"


class SoftmaxCall(NamedTuple):
    """
    One call of the softmax that a converted module had before its conversion.

    Args:
        module (`nn.Module`): the attention module.
        layer ([`GMAConversion`]): the child that the conversion added to the module.
        query (`torch.Tensor` of shape `(batch, num_heads, length, head_dim)`): queries.
        key (`torch.Tensor` of shape `(batch, key_value_heads, length, head_dim)`): keys.
        value (`torch.Tensor` of shape `(batch, key_value_heads, length, value_dim)`): values.
        attention_mask (`Any`): the mask, in the form of the attention implementation.
        scaling (`float` or `None`): factor of the logits.
        arguments (`dict[str, Any]`): further arguments of the attention function.
        output (`torch.Tensor` of shape `(batch, num_heads, length, value_dim)`): the output of softmax.
        rotation (`Rotation` or `None`): rotary positions of the tokens.
    """

    module: nn.Module
    layer: GMAConversion
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Any
    scaling: float | None
    arguments: dict[str, Any]
    output: Tensor
    rotation: Rotation | None

    def routed(self) -> tuple[Tensor, Tensor]:
        """
        Queries and keys as the mixtures would route them.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: both, in their shapes.
        """
        return self.layer.route(self.query, self.key, self.rotation)

    def student(self) -> Tensor:
        """
        The output of GMA for the same queries, keys and values.

        Returns:
            `torch.Tensor` of shape `(batch, num_heads, length, value_dim)`: the output.
        """
        states = (self.query, self.key, self.value, self.attention_mask)
        options = {"scaling": self.scaling, "rotation": self.rotation, **self.arguments}
        output, _ = gma_attention_forward(self.module, *states, **options)
        return output.transpose(1, 2)

    def real(self) -> Tensor | None:
        """
        The real tokens of the call.

        Returns:
            `torch.BoolTensor` of shape `(batch, length)`: `True` at real tokens; `None` if there is no padding.
        """
        return read_mask(self.attention_mask, self.query)[0]


class Role(NamedTuple):
    """The role of a converted module within [`as_teacher`]."""

    layer: GMAConversion
    is_student: bool
    observe: Callable[[SoftmaxCall], None] | None


_roles: WeakKeyDictionary[nn.Module, Role] = WeakKeyDictionary()


@contextmanager
def as_teacher(
    model: nn.Module,
    observe: Callable[[SoftmaxCall], None] | None = None,
    students: Collection[GMAConversion] = (),
) -> Iterator[None]:
    """
    Within this context, the converted modules of a model run the softmax that they had before their conversion. Do not pass
    a cache.

    Args:
        model (`nn.Module`): a converted model, with or without adapters and wrappers around it.
        observe (`Callable`, *optional*): called with a [`SoftmaxCall`] after each softmax of a converted module.
        students (`Collection[GMAConversion]`, *optional*, defaults to `()`): layers that stay GMA.

    Yields:
        `None`.

    Raises:
        ValueError: if no layer of the model was converted.
    """
    modules = {model.get_submodule(name): layer for name, layer in expect_gma_layers(model).items()}
    # Modules with the same configuration share one view of it
    views = list({id(module.config): module.config for module in modules}.values())
    models = [module for module in model.modules() if getattr(module, "_softmax_implementations", None)]
    # Contexts may be nested
    outer_names = [attention_implementation(view) for view in views]
    outer_roles = {module: _roles.get(module) for module in modules}
    try:
        for converted_model in models:
            restore_softmax_implementations(converted_model)
        for view in views:
            set_attention_implementation(view, TEACHER_IMPLEMENTATION)
        for module, layer in modules.items():
            _roles[module] = Role(layer, layer in students, observe)
        yield
    finally:
        for module, role in outer_roles.items():
            if role is None:
                _roles.pop(module, None)
            else:
                _roles[module] = role
        for view, name in zip(views, outer_names, strict=True):
            set_attention_implementation(view, name)
        for converted_model in models:
            use_linear_masks(converted_model)


def expect_gma_layers(model: nn.Module) -> dict[str, GMAConversion]:
    """
    [`gma_layers`] of a model that must have such layers.

    Raises:
        ValueError: if no layer of the model was converted.
    """
    layers = gma_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no converted layers. Convert some first: `gma_hf.convert_to_gma(model)`."
        )
    return layers


@torch.compiler.disable
def teacher_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    gma_call: AttentionCall | None = None,
    gma_layout: CallLayout | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that a converted module had before, with a report to the observer."""
    role = _roles[module]
    if role.is_student:
        told = {"gma_call": gma_call, "gma_layout": gma_layout, **kwargs}
        return gma_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **told)
    softmax = softmax_function(module)
    output, weights = softmax(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if role.observe is not None:
        # Attention functions return [batch, length, heads, value_dim]
        heads_first = output.transpose(1, 2)
        states = (query, key, value, attention_mask)
        rotation = None if gma_call is None else gma_call.rotation
        role.observe(SoftmaxCall(module, role.layer, *states, scaling, kwargs, heads_first, rotation))
    return output, weights


def softmax_function(module: nn.Module) -> Callable:
    """The attention function that the configuration of a converted module's model names."""
    name = attention_implementation(module.softmax_config)
    # Every modeling file has its own eager function, which is not in the interface
    if name in (None, "eager"):
        return function_of_modeling_file(module, "eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS[name]


AttentionInterface.register(TEACHER_IMPLEMENTATION, teacher_attention_forward)
