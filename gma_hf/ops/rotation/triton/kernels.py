# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Rotations undone in one pass over memory, where a model rotates halves, as most do: dimension i of the first D with i + D / 2.

    y_i = (c_i x_i + s_i x_{i+D/2}) / (c_i^2 + s_i^2)        y_{i+D/2} = (c_i x_{i+D/2} - s_i x_i) / (c_i^2 + s_i^2)

The first pairs may stay as they are. Its gradient is the same with -s. All arithmetic is float32. x [B, H, N, d], c and s [B or 1, N, D / 2 or more].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.triton.launching import on_its_device
from ...attention.triton.tiles import rounded


TOKENS = 32  # of a program


@triton.jit
def turn_kernel(
    X, Cos, Sin, Y, x_batch, x_head, x_token, y_batch, y_head, y_token, cos_batch, cos_token, H, N, half, rest, undone, SIGN,
    BT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows, columns = tokens.to(tl.int64)[:, None], tl.arange(0, HALF)[None, :]
    is_there = (tokens < N)[:, None] & (columns < half)
    angles = batch * cos_batch + rows * cos_token + columns
    cos = tl.load(Cos + angles, mask=is_there, other=1.0).to(tl.float32)
    sin = tl.load(Sin + angles, mask=is_there, other=0.0).to(tl.float32)
    is_undone = columns >= undone
    cos, sin = tl.where(is_undone, cos, 1.0), tl.where(is_undone, SIGN * sin, 0.0)
    norm = cos * cos + sin * sin
    x = X + batch * x_batch + head * x_head + rows * x_token
    y = Y + batch * y_batch + head * y_head + rows * y_token
    first = tl.load(x + columns, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(x + half + columns, mask=is_there, other=0.0).to(tl.float32)
    dtype = Y.dtype.element_ty
    tl.store(y + columns, rounded((cos * first + sin * second) / norm, dtype), mask=is_there)
    tl.store(y + half + columns, rounded((cos * second - sin * first) / norm, dtype), mask=is_there)
    if REST > 0:
        others = tl.arange(0, REST)[None, :]
        is_there = (tokens < N)[:, None] & (others < rest)
        tl.store(y + 2 * half + others, tl.load(x + 2 * half + others, mask=is_there, other=0.0), mask=is_there)


@on_its_device
def turn(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, undone: int, sign: float) -> Tensor:
    """y as above, of sign 1, or its gradient, of sign -1; in the memory order of x, if that is dense."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, length, dim = x.shape
    half, rest = rotary_dim // 2, dim - rotary_dim
    y = torch.empty_like(x)
    cos_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    turn_kernel[(triton.cdiv(length, TOKENS), batch * heads)](
        x, cos, sin, y, *x.stride()[:3], *y.stride()[:3], cos_batch, cos.stride(1), heads, length, half, rest, undone, sign,
        BT=TOKENS, HALF=triton.next_power_of_2(half), REST=0 if rest == 0 else triton.next_power_of_2(rest),
    )  # fmt: skip
    return y


class Turn(torch.autograd.Function):
    """The kernel with its gradient; of the angles there is none."""

    @staticmethod
    def forward(ctx, x, cos, sin, rotary_dim, undone):
        ctx.save_for_backward(cos, sin)
        ctx.sizes = rotary_dim, undone
        return turn(x, cos, sin, rotary_dim, undone, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return turn(grad, *ctx.saved_tensors, *ctx.sizes, -1.0), None, None, None, None


def turn_back(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, undone: int = 0) -> Tensor:
    """
    Queries or keys before their rotation, or before the last of their rotations.

    Args:
        x (`torch.Tensor` of shape `(batch, heads, length, dim)`): rotated in their first `rotary_dim` dimensions.
        cos, sin (`torch.Tensor` of shape `(batch or 1, length, at least rotary_dim / 2)`): by which.
        rotary_dim (`int`): D.
        undone (`int`): the first column of c and s that is undone.

    Returns:
        `torch.Tensor` of the shape and dtype of `x`.
    """
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return Turn.apply(x, cos, sin, rotary_dim, undone)
