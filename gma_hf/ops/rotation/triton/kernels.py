# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Rotations undone in one pass over memory, for models that rotate halves, as most do: dimension i of the first D with i + D /
2.

    y_i = (c_i x_i + s_i x_{i+D/2}) / (c_i^2 + s_i^2)        y_{i+D/2} = (c_i x_{i+D/2} - s_i x_i) / (c_i^2 + s_i^2)

The first pairs may keep their rotation. The gradient is the same with -s. All arithmetic is float32. x [B, H, N, d], c and s
[B or 1, N, D / 2 or more].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...attention.triton.launching import on_its_device
from ...attention.triton.tiles import rounded
from ...operators import differentiate_once, on_one_device, vmapped_by_loops


TOKENS = 32  # of a program


@triton.jit
def turn_kernel(
    X, Cos, Sin, Y, x_batch, x_head, x_token, y_batch, y_head, y_token, cos_batch, cos_token, H, N, half, rest, undone, SIGN, blocks,
    BT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # One axis for everything: the others end at 65,535 programs
    tokens = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    row = tl.program_id(0) // blocks
    batch, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
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


torch.library.define(
    "gma_hf::turn_back",
    "(Tensor x, Tensor cos, Tensor sin, int rotary_dim, int undone, float sign) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::turn_back", "default")
@on_one_device
@on_its_device
def turn(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, undone: int, sign: float) -> Tensor:
    """y as above (sign 1), or its gradient (sign -1); in the memory order of x, if x is dense."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, length, dim = x.shape
    half, rest = rotary_dim // 2, dim - rotary_dim
    y = torch.empty_like(x)
    cos_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    blocks = triton.cdiv(length, TOKENS)
    turn_kernel[(batch * heads * blocks,)](
        x, cos, sin, y, *x.stride()[:3], *y.stride()[:3], cos_batch, cos.stride(1), heads, length, half, rest, undone, sign,
        blocks,
        BT=TOKENS, HALF=triton.next_power_of_2(half), REST=0 if rest == 0 else triton.next_power_of_2(rest),
    )  # fmt: skip
    return y


@torch.library.register_fake("gma_hf::turn_back")
@on_one_device
def _(x, cos, sin, rotary_dim, undone, sign):
    return torch.empty_like(x if x.stride(-1) == 1 else x.contiguous())


vmapped_by_loops("turn_back")


def turned_forward(grad, cos, sin, rotary_dim, undone):
    """The gradient of the undone rotation."""
    return (torch.ops.gma_hf.turn_back(grad, cos, sin, rotary_dim, undone, -1.0),)


class Turn(torch.autograd.Function):
    """The kernel with its gradient. The angles have no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, cos, sin, rotary_dim, undone):
        return torch.ops.gma_hf.turn_back(x, cos, sin, rotary_dim, undone, 1.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:3])
        ctx.sizes = inputs[3:]

    @staticmethod
    def backward(ctx, grad):
        (turned,) = differentiate_once(turned_forward, grad, *ctx.saved_tensors, *ctx.sizes)
        return turned, None, None, None, None


def turn_back(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, undone: int = 0) -> Tensor:
    """
    Queries or keys before their rotation, or before the last of their rotations.

    Args:
        x (`torch.Tensor` of shape `(batch, heads, length, dim)`): rotated in their first `rotary_dim` dimensions.
        cos, sin (`torch.Tensor` of shape `(batch or 1, length, at least rotary_dim / 2)`): the cosines and sines of the
        rotation.
        rotary_dim (`int`): D.
        undone (`int`): the first column of c and s that is undone.

    Returns:
        `torch.Tensor` of the shape of `x`: the result, in the dtype of `x`.
    """
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return Turn.apply(x, cos, sin, rotary_dim, undone)
