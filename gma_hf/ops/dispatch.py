# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Which way runs a call, and why another cannot: one dispatcher for all operators (attention, window, convolution, rotation).

An operator lists its ways in order of preference, each with a function that says why it cannot run a call. The first way that
suits a call and can run it is taken. All ways of an operator give the same numbers.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..compat import is_forward_mode


logger = logging.getLogger(__name__)
ENVIRONMENT_VARIABLE = "GMA_HF_BACKEND"  # forces a way, for debugging
BACKENDS = ("triton", "recurrent", "chunked", "reference")  # names of the ways of attention, by preference
_EXPLAINED: set[str] = set()  # messages that have been logged


class Way(NamedTuple):
    """One way to compute an operator."""

    name: str
    cannot_run: Callable[..., str | None]  # of a call: why this way cannot run it, or None
    suits: Callable[..., bool]  # of a call: whether "auto" wants this way, where it can run
    run: Callable[..., Any] | None = (
        None  # of a call: its result; None where the operator's own file branches on the name
    )


def not_in_forward_mode() -> str | None:
    """Why a way whose gradient is written by hand cannot run a call, or `None`."""
    return "it has no forward-mode derivative." if is_forward_mode() else None


# The last way of operators that have kernels and plain PyTorch: it can run everything
PLAIN = Way("pytorch", lambda *call: None, lambda *call: True)


def choose(what: str, ways: tuple[Way, ...], *call: Any, backend: str = "auto") -> Way:
    """
    The way that runs a call.

    Args:
        what (`str`): what is computed, for messages.
        ways (`tuple[Way, ...]`): the ways of the operator, by preference; the last one can run everything.
        call: what the ways' functions are given.
        backend (`str`, *optional*, defaults to `"auto"`): `"auto"` or the name of a way. The environment variable
            GMA_HF_BACKEND takes its place, if it is set. An operator that lacks the way it names takes its last one.

    Returns:
        `Way`: the way that was named; with `"auto"` the first that suits the call and can run it.

    Raises:
        ValueError: if there is no way of that name, or if it cannot run the call.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    name = forced or backend
    if name == "auto":
        return first_that_can(what, ways, call)
    for way in ways:
        if way.name == name:
            reason = way.cannot_run(*call)
            if reason is None:
                return way
            able = [other.name for other in ways if other.cannot_run(*call) is None]
            advice = f"Unset {ENVIRONMENT_VARIABLE}, or use" if forced else "Use"
            raise ValueError(f"Backend {name!r} cannot run this {what}: {reason} {advice} 'auto' or one of {able}.")
    if forced and name in BACKENDS:
        return ways[-1]
    known, source = (BACKENDS, f" in {ENVIRONMENT_VARIABLE}") if forced else ([way.name for way in ways], "")
    raise ValueError(f"Unknown backend {name!r}{source}; expected 'auto' or one of {list(known)}.")


def first_that_can(what: str, ways: tuple[Way, ...], call: tuple) -> Way:
    """The first way that suits a call and can run it; why others were passed over is logged once."""
    for way in ways[:-1]:
        if way.suits(*call):
            reason = way.cannot_run(*call)
            if reason is None:
                return way
            explain(f"The {way.name} backend cannot run this {what}: {reason} Plain PyTorch runs it.")
    return ways[-1]


def explain(message: str) -> None:
    """Log a message once; not while a program is compiled."""
    if not torch.compiler.is_compiling() and message not in _EXPLAINED:
        _EXPLAINED.add(message)
        logger.info(message)
