# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Queries and keys as they were before rotary positions (Su et al., arXiv:2104.09864).

Softmax over rotated queries and keys sees only how far apart two tokens are. A mixture routes each vector by itself, and to it
a key at an angle that it was not fitted to is a point that it does not know. Fast rotations come to every angle within a few
tokens, and tell which tokens are near; slow ones come to new angles as long as the text goes on. So a converted layer undoes
the slow rotations of what it routes. No convention of rotating is known here: the model's own `apply_rotary_pos_emb`, given
the inverse of the rotation that the attention module was called with, turns back whatever it has turned; and that it does is
tried on the model. A rotation is a column of the cosines and sines that the module is given.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...compat import function_of_modeling_file
from ...modeling.layout import Layout
from ...ops.dispatch import PLAIN, Way, choose, not_in_forward_mode
from ...ops.triton_support import DTYPES, is_on_gpu, missing


# Rounding errors of a rotation and its inverse, in units of the last place of the largest entry
ROUNDINGS = 4
# Ranges of the columns of cosines and sines, first and last + 1
Columns = Sequence[tuple[int, int]]


def cannot_run(query: Tensor, *others: Tensor) -> str | None:
    """Why the kernel cannot run a call, or `None`."""
    if not all(x.dtype in DTYPES for x in (query, *others)):
        return "queries, keys or angles are float64."
    return not_in_forward_mode() or missing(query.device.type, query.device.index)


WAYS = (Way("triton", cannot_run, is_on_gpu), PLAIN)


class Rotation(NamedTuple):
    """The rotation of the current tokens, from one call of an attention module."""

    rotate: Callable[..., tuple[Tensor, Tensor]]  # (query, key, cos, sin) to both, rotated
    cos: Tensor  # [batch or 1, length, rotary_dim or half of it]
    sin: Tensor  # likewise

    def undo(
        self, query: Tensor, key: Tensor, rotary_dim: int, columns: Columns | None = None, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Queries and keys `(batch, heads, length, dim)` with their first `rotary_dim` dimensions turned back, by the angles of
        some columns (`first, last + 1` of each range) or of all.

        The inverse of [[c, -s], [s, c]] is [[c, s], [-s, c]] / (c^2 + s^2): also where scaled frequencies (YaRN) come with a
        factor, and where cosines and sines were rounded. It is the same for all layers: `layout`, that of the tokens, keeps it.
        """
        if columns is None:
            columns = ((0, self.cos.shape[-1]),)
        if self._uses_kernels(query, key, rotary_dim, columns):
            from ...ops.rotation.triton.kernels import turn_back

            cos, sin = (x.to(query.device) for x in (self.cos, self.sin))
            if query.shape[2] == 1 and query.dtype == key.dtype:
                # Of one token a copy costs less than another launch
                turned = turn_back(torch.cat([query, key], dim=1), cos, sin, rotary_dim, columns[0][0])
                return turned.split((query.shape[1], key.shape[1]), dim=1)
            return tuple(turn_back(x, cos, sin, rotary_dim, columns[0][0]) for x in (query, key))
        dtype = torch.promote_types(query.dtype, torch.float32)
        halves = turns_halves(self.rotate, self.cos.shape[-1], rotary_dim)

        def invert() -> tuple[Tensor, Tensor, Tensor]:
            cos, sin = self._inverse(columns, dtype, query.device)
            if halves:
                # x1' = c x1 + s x2, x2' = c x2 - s x1: the sine of one half, and of the other with the other sign
                half = rotary_dim // 2
                cos, sin = (
                    torch.cat([cos[..., :half]] * 2, dim=-1),
                    torch.cat([-sin[..., :half], sin[..., :half]], dim=-1),
                )
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            # The cosines are held as long as their number is
            return cos, sin, self.cos

        name = ("undo", id(self.cos), tuple(map(tuple, columns)), dtype, rotary_dim, halves)
        cos, sin, _ = invert() if layout is None else layout.once(name, invert)
        if halves:
            return self._turn_halves(query, key, rotary_dim, cos, sin, dtype)
        turned = [x[..., :rotary_dim].to(dtype) for x in (query, key)]
        turned = self.rotate(*turned, cos, sin)
        return tuple(
            torch.cat([x.to(whole.dtype), whole[..., rotary_dim:]], dim=-1)
            for x, whole in zip(turned, (query, key), strict=True)
        )

    def _inverse(self, columns: Columns, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the inverse in some columns, of no rotation in the others."""
        cos, sin = (x.to(device, dtype) for x in (self.cos, self.sin))
        norm = cos.square() + sin.square()
        is_undone = torch.zeros(cos.shape[-1], dtype=torch.bool, device=cos.device)
        for first, stop in columns:
            is_undone[first:stop] = True
        return torch.where(is_undone, cos / norm, 1.0), torch.where(is_undone, -sin / norm, 0.0)

    @staticmethod
    def _turn_halves(
        query: Tensor, key: Tensor, rotary_dim: int, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The rotation of the first half of the dimensions against the second, of queries and keys together."""
        whole = torch.cat([query, key], dim=1)
        x = whole if rotary_dim == whole.shape[-1] else whole[..., :rotary_dim]
        x = x.to(dtype)
        turned = torch.addcmul(x * cos, x.roll(rotary_dim // 2, dims=-1), sin).to(whole.dtype)
        if rotary_dim < whole.shape[-1]:
            turned = torch.cat([turned, whole[..., rotary_dim:]], dim=-1)
        return turned.split((query.shape[1], key.shape[1]), dim=1)

    def _uses_kernels(self, query: Tensor, key: Tensor, rotary_dim: int, columns: Columns) -> bool:
        """Whether the rotation is one that the fused kernel knows, where it can run. A compiler fuses the general form."""
        if torch.compiler.is_compiling() or not turns_halves(self.rotate, self.cos.shape[-1], rotary_dim):
            return False
        # Of the first half, which is all that counts, the kernel undoes the last ones
        if columns[0][0] >= rotary_dim // 2 or columns[0][1] < rotary_dim // 2:
            return False
        return choose("rotation", WAYS, query, key, self.cos, self.sin).name == "triton"


@torch.compiler.assume_constant_result
def turns_halves(rotate: Callable[..., tuple[Tensor, Tensor]], width: int, rotary_dim: int) -> bool:
    """
    Whether a function turns the first half of the dimensions against the second, by angles of which `width` are given per
    token and the first half count: tried on a few numbers, once. A compiler takes the answer and does not look inside.
    """
    return try_to_turn_halves(rotate, width, rotary_dim)


@lru_cache
def try_to_turn_halves(rotate: Callable[..., tuple[Tensor, Tensor]], width: int, rotary_dim: int) -> bool:
    """The trial of [`turns_halves`]."""
    half = rotary_dim // 2
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, 2, rotary_dim, generator=generator)
        angles = torch.rand(1, 2, half, generator=generator).repeat(1, 1, width // half)
        cos, sin = angles.cos(), angles.sin()
        turned, _ = rotate(x, x, cos, sin)
        cos, sin = cos[..., :half], sin[..., :half]
        first, second = x.split(half, dim=-1)
        expected = torch.cat([cos * first - sin * second, cos * second + sin * first], dim=-1)
    return turned.shape == expected.shape and is_close(turned, expected)


def rotary_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`apply_rotary_pos_emb` of a module's modeling file; `None` if there is none."""
    return function_of_modeling_file(module, "apply_rotary_pos_emb")


def find_position_embeddings(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines among the arguments of an attention module."""
    for argument in (kwargs.get("position_embeddings"), *args):
        if isinstance(argument, tuple | list) and len(argument) == 2 and all(isinstance(x, Tensor) for x in argument):
            return tuple(argument)
    return None


def find_rotary_dim(
    module: nn.Module, args: tuple, kwargs: dict, states: tuple[Tensor, Tensor], watched: dict[nn.Module, tuple]
) -> int:
    """
    How many of the first dimensions of its queries and keys an attention module rotates such that [`Rotation.undo`] turns them
    back. The module is called once more, with the rotation by nothing: that is what has to come out.

    Args:
        module (`nn.Module`): the attention module.
        args (`tuple`), kwargs (`dict`): what it was called with.
        states (`tuple[Tensor, Tensor]`): the query and key that its attention function got then.
        watched (`dict`): from a module to the query and key of its latest call, filled in while it runs.

    Returns:
        `int`: 0 if it rotates nothing, or in another way.
    """
    embeddings, rotate = find_position_embeddings(args, kwargs), rotary_function(module)
    if embeddings is None or rotate is None:
        return 0
    nothing = (torch.ones_like(embeddings[0]), torch.zeros_like(embeddings[1]))

    def replace(argument: Any) -> Any:
        if isinstance(argument, Cache):
            return None
        return argument if find_position_embeddings((argument,), {}) is None else nothing

    # What a model does with arguments such as these is its own affair, and so are its errors
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


def slow_columns(cos: Tensor, sin: Tensor, wavelength: float) -> list[tuple[int, int]]:
    """
    Which rotations take more than so many tokens for a turn.

    Args:
        cos, sin (`torch.Tensor` of shape `(..., length, columns)`): of successive tokens, the first of a sequence first.
        wavelength (`float`): in tokens.

    Returns:
        `list[tuple[int, int]]`: ranges of columns, first and last + 1. All of them if there are no two tokens to compare.
    """
    if cos.shape[-2] < 2:
        return [(0, cos.shape[-1])]
    cos, sin = (x.reshape(-1, *x.shape[-2:])[0, :2].cpu().double() for x in (cos, sin))
    # By how much the second token is turned further than the first
    angle = torch.atan2(sin[1] * cos[0] - cos[1] * sin[0], cos[1] * cos[0] + sin[1] * sin[0]).abs()
    is_slow = (angle * wavelength < 2 * math.pi).tolist()
    ranges, first = [], 0
    for slow, run in groupby(is_slow):
        stop = first + len(list(run))
        if slow:
            ranges.append((first, stop))
        first = stop
    return ranges


def is_close(x: Tensor, y: Tensor) -> bool:
    """Equal up to rounding errors."""
    tolerance = ROUNDINGS * torch.finfo(y.dtype).eps * y.abs().max()
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance)
