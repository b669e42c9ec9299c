# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Queries and keys before rotary positions (Su et al., arXiv:2104.09864). The public class is [`Rotation`].

    [[c, -s], [s, c]]^-1 = [[c, s], [-s, c]] / (c^2 + s^2)

Softmax over rotated queries and keys depends only on the distance of two tokens. A mixture routes each vector alone, so a
key at an angle that the mixture was not fitted to is an unknown point. Fast rotations reach every angle within a few tokens,
and tell which tokens are near. Slow rotations reach new angles as long as the text continues. So a converted layer undoes
the slow rotations of the vectors that it routes. This file needs no convention of rotating: the `apply_rotary_pos_emb` of
the model gets the inverse of the rotation, and so undoes its own work. A trial on the model checks that it does. A rotation
is a column of the cosines and sines that the module gets.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import Ways


# Rounding errors of a rotation and its inverse, in units of the last place of the largest entry
ROUNDINGS = 4
# Ranges of the columns of cosines and sines, first and last + 1
Columns = Sequence[tuple[int, int]]
# The backends for rotations of the first half of the dimensions with the second half, which most models use. Each registers
# itself when the package imports it
WAYS = Ways("rotation", ("triton", "pytorch"))


def each_time(name: Any, compute: Callable[[], Any]) -> Any:
    """The `once` of a call that keeps nothing."""
    return compute()


class Rotation(NamedTuple):
    """The rotation of the current tokens, from one call of an attention module."""

    rotate: Callable[..., tuple[Tensor, Tensor]]  # (query, key, cos, sin) to both, rotated
    cos: Tensor  # [batch or 1, length, rotary_dim or half of it]
    sin: Tensor  # likewise

    def undo(
        self,
        query: Tensor,
        key: Tensor,
        rotary_dim: int,
        columns: Columns | None = None,
        once: Callable[[Any, Callable[[], Any]], Any] = each_time,
    ) -> tuple[Tensor, Tensor]:
        """
        Queries and keys before their rotation. This also works if scaled frequencies (YaRN) have a factor, and if cosines
        and sines were rounded.

        Args:
            query, key (`torch.Tensor` of shape `(batch, heads, length, dim)`): rotated in their first `rotary_dim`
            dimensions.
            rotary_dim (`int`): the number of rotated dimensions.
            columns (`Sequence[tuple[int, int]]`, *optional*): the rotations to undo, as ranges of the columns of the
                cosines, first and last + 1; by default all.
            once (`Callable`, *optional*): computes the value of a name the first time only, because the inverse is the same
                for all layers of a call, see `Layout.once`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: queries and keys, in their shapes and dtypes.
        """
        width = self.cos.shape[-1]
        columns = ((0, width),) if columns is None else tuple(map(tuple, columns))
        if turns_halves(self.rotate, width, rotary_dim):
            call = (query, key, self.cos, self.sin)
            # Of the first half, which is all that counts, the kernel undoes the last rotations. A compiler fuses what PyTorch does
            is_kernels = columns[0][0] < rotary_dim // 2 <= columns[0][1] and not torch.compiler.is_compiling()
            way = WAYS.choose(*call) if is_kernels else WAYS.last
            return way.run(*call, rotary_dim, columns, once)
        dtype = torch.promote_types(query.dtype, torch.float32)

        def invert() -> tuple[Tensor, Tensor, Tensor]:
            # The cosines are kept as long as their id is used
            return *inverse(self.cos, self.sin, columns, dtype, query.device), self.cos

        cos, sin, _ = once(("undo", id(self.cos), columns, dtype, rotary_dim), invert)
        turned = self.rotate(*(x[..., :rotary_dim].to(dtype) for x in (query, key)), cos, sin)
        return tuple(
            torch.cat([x.to(whole.dtype), whole[..., rotary_dim:]], dim=-1)
            for x, whole in zip(turned, (query, key), strict=True)
        )


def inverse(
    cos: Tensor, sin: Tensor, columns: Columns, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the inverse in some columns, and of no rotation in the other columns."""
    cos, sin = (x.to(device, dtype) for x in (cos, sin))
    norm = cos.square() + sin.square()
    is_undone = torch.zeros(cos.shape[-1], dtype=torch.bool, device=cos.device)
    for first, stop in columns:
        is_undone[first:stop] = True
    return torch.where(is_undone, cos / norm, 1.0), torch.where(is_undone, -sin / norm, 0.0)


@torch.compiler.assume_constant_result
def turns_halves(rotate: Callable[..., tuple[Tensor, Tensor]], width: int, rotary_dim: int) -> bool:
    """
    Whether a function rotates the first half of the dimensions with the second half, by angles of which `width` are given
    per token and the first half count. A trial on a few numbers gives the answer, once. A compiler takes the answer and does
    not look inside.
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


def slow_columns(cos: Tensor, sin: Tensor, wavelength: float) -> list[tuple[int, int]]:
    """
    The rotations that need more than `wavelength` tokens for a full turn.

    Args:
        cos, sin (`torch.Tensor` of shape `(..., length, columns)`): cosines and sines of successive tokens, from the first
        token of a sequence on.
        wavelength (`float`): a number of tokens.

    Returns:
        `list[tuple[int, int]]`: ranges of columns, first and last + 1. All columns if there are no two tokens to compare.
    """
    if cos.shape[-2] < 2:
        return [(0, cos.shape[-1])]
    cos, sin = (x.reshape(-1, *x.shape[-2:])[0, :2].cpu().double() for x in (cos, sin))
    # The angle between the second token and the first token
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
