# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The dispatcher of all operators (attention, window, convolution, rotation): which way runs a call, and why another way
cannot.

An operator has a table of ways in order of preference. Each way has a function that says why it cannot run a call. The first
way that suits a call and can run it is taken. All ways of an operator give the same numbers. This file also has the check
that every operator needs: the tensors of a call are on one device.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import is_forward_mode


logger = logging.getLogger(__name__)
ENVIRONMENT_VARIABLE = "GMA_HF_BACKEND"  # forces a way, for debugging
BACKENDS = ("triton", "recurrent", "chunked", "reference")  # names of the ways of attention, by preference
_EXPLAINED: set[str] = set()  # messages that have been logged


class Way(NamedTuple):
    """One way to compute an operator."""

    name: str
    cannot_run: Callable[..., str | None] = lambda *call: None  # of a call: why this way cannot run it, or None
    suits: Callable[..., bool] = lambda *call: True  # of a call: whether "auto" prefers this way if it can run
    run: Callable[..., Any] | None = (
        None  # of a call: its result; None where the operator's own file branches on the name
    )


def not_in_forward_mode(*call: Any) -> str | None:
    """Why a way with a hand-written gradient cannot run a call, or `None`."""
    return "it has no forward-mode derivative." if is_forward_mode() else None


class Ways:
    """
    The ways of one operator. A way joins the table when its file is imported, and the folder of the operator imports all
    files. So the file of the public function needs the table only, and no way.

    Args:
        what (`str`): what the operator computes, for messages.
        order (`tuple[str, ...]`): the names of the ways by preference. The last way can run every call.
    """

    def __init__(self, what: str, order: tuple[str, ...]):
        self.what = what
        self.order = order
        self.ways: tuple[Way, ...] = ()

    def register(self, way: Way) -> None:
        """Add a way. It replaces a way of the same name."""
        others = [other for other in self.ways if other.name != way.name]
        self.ways = tuple(sorted([*others, way], key=lambda one: self.order.index(one.name)))

    @property
    def last(self) -> Way:
        """The way that can run every call."""
        return self.ways[-1]

    def choose(self, *call: Any, backend: str = "auto") -> Way:
        """
        The way that runs a call.

        Args:
            call (`Any`): the argument of the functions of the ways.
            backend (`str`, *optional*, defaults to `"auto"`): `"auto"` or the name of a way. The environment variable
                GMA_HF_BACKEND overrides this argument. An operator without a way of this name then runs without kernels.

        Returns:
            `Way`: the named way; with `"auto"` the first way that suits the call and can run it.

        Raises:
            ValueError: if there is no way of this name, or if it cannot run the call.
        """
        forced = os.environ.get(ENVIRONMENT_VARIABLE)
        name = forced or backend
        if name == "auto":
            return self._first_that_can(self.ways, call)
        for way in self.ways:
            if way.name == name:
                reason = way.cannot_run(*call)
                if reason is None:
                    return way
                able = [other.name for other in self.ways if other.cannot_run(*call) is None]
                advice = f"Unset {ENVIRONMENT_VARIABLE}, or use" if forced else "Use"
                raise ValueError(
                    f"Backend {name!r} cannot run this {self.what}: {reason} {advice} 'auto' or one of {able}."
                )
        if forced and name in BACKENDS:
            return self._first_that_can([way for way in self.ways if way.name != "triton"], call)
        known, source = (BACKENDS, f" in {ENVIRONMENT_VARIABLE}") if forced else (self.order, "")
        raise ValueError(f"Unknown backend {name!r}{source}; expected 'auto' or one of {list(known)}.")

    def _first_that_can(self, ways: Sequence[Way], call: tuple) -> Way:
        """The first way that suits a call and can run it. The reasons why other ways were skipped are logged once."""
        for way in ways[:-1]:
            if way.suits(*call):
                reason = way.cannot_run(*call)
                if reason is None:
                    return way
                explain(f"The {way.name} backend cannot run this {self.what}: {reason} Plain PyTorch runs it.")
        return ways[-1]


def explain(message: str) -> None:
    """Log a message once, but not during compilation."""
    if not torch.compiler.is_compiling() and message not in _EXPLAINED:
        _EXPLAINED.add(message)
        logger.info(message)


def expect_one_device(named: Iterable[tuple[str, Any]]) -> None:
    """
    Check that all tensors are on one device, and that none is on "meta" beside tensors with values.

    Args:
        named (`Iterable[tuple[str, Any]]`): names with tensors or lists of tensors; other values are skipped.

    Raises:
        ValueError: if a tensor is on another device than the first tensor. The message has its name.
    """
    first_name = device = None
    for name, x in named:
        for part in x if isinstance(x, list | tuple) else (x,):
            if not isinstance(part, Tensor):
                continue
            if device is None:
                first_name, device = name, part.device
            elif part.device != device:
                missing = name if part.device.type == "meta" else first_name if device.type == "meta" else None
                advice = "Move all to one device" if missing is None else f"Load the values of {missing} first"
                raise ValueError(f"{name} is on {part.device}, but {first_name} is on {device}. {advice}.")
