# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
What every registered operator of the package (`torch.ops.gma_hf`) shares: a check for one device, and a rule for
`torch.vmap`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .dispatch import expect_one_device


def on_one_device(function: Callable) -> Callable:
    """
    Check the tensors of an operator before its implementation runs, real or fake. If one tensor is on "meta", PyTorch calls
    the fake implementation, whose result has no values.
    """
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    # `*saved` stands for as many tensors as there are
    last = names[-1] if any(x.kind is x.VAR_POSITIONAL for x in parameters.values()) else None

    @functools.wraps(function)
    def checked(*arguments):
        rest = () if last is None else (last,) * (len(arguments) - len(names))
        expect_one_device(zip((*names, *rest), arguments, strict=False))
        return function(*arguments)

    return checked


def vmapped_by_loops(name: str) -> None:
    """
    Give an operator a rule for `torch.vmap`: one call for every index of the mapped dimension.

    Args:
        name (`str`): name of the operator in `torch.ops.gma_hf`.
    """
    operator = getattr(torch.ops.gma_hf, name)

    def rule(info, in_dims, *arguments):
        results = [
            operator(*(part_of(argument, dim, i) for argument, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return type(results[0])(stacked), type(results[0])([0] * len(stacked))

    torch.library.register_vmap(f"gma_hf::{name}", rule)


def part_of(argument: Any, dim: Any, index: int) -> Any:
    """One index of the mapped dimension of an argument, or of every tensor in a list."""
    if isinstance(argument, list | tuple):
        dims = dim if isinstance(dim, list | tuple) else [dim] * len(argument)
        return [part_of(x, d, index) for x, d in zip(argument, dims, strict=True)]
    return argument if dim is None else argument.select(dim, index)


class DifferentiatedOnce(torch.autograd.Function):
    """
    The first derivative of an operator. It has no derivative itself, and its error says so, also inside of `torch.func`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function, *arguments):
        return tuple(function(*arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "This operator cannot be differentiated twice in reverse mode: its gradient is written by hand. For the product of a "
            "Hessian and a vector use `torch.func.jvp` of `torch.func.grad`, which works. Or give `gaussian_mixture_attention` "
            "backend='reference', which PyTorch differentiates as often as you like."
        )


def differentiate_once(function: Callable[..., Iterable[Tensor]], *arguments: Any) -> tuple[Tensor, ...]:
    """
    Gradients by a function of tensors and constants, for the `backward` of an autograd function.

    Args:
        function (`Callable`): returns the gradients.
        arguments (`Any`): arguments of `function`; tensors must not be inside of lists.

    Returns:
        `tuple[torch.Tensor]`: the result of `function`. Differentiating it is an error.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(function(*arguments))
    return DifferentiatedOnce.apply(function, *arguments)
