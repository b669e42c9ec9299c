# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The kernels of the short convolution as registered operators of PyTorch: their memory, their launches, their derivatives.

inputs [B, N, C], weight [C, 1, K], sequence_ids [B, N] -> outputs [B, N - first, C], of the positions from `first` on.
"""

import torch
from torch import Tensor

from ...attention.triton.launching import on_its_device, row_contiguous
from ...attention.triton.plan import cdiv
from ...operators import differentiate_once, on_one_device, vmapped_by_loops
from .kernels import convolve_kernel, grad_kernel


CHANNELS = 128  # of a block: rows of 256 bytes in 16 bits
# Tokens of a program and of a tile. Longer segments load weights, and write partial sums, less often.
CONVOLVE = {"SEGMENT": 128, "T": 16, "num_warps": 4}
GRADIENT = {"SEGMENT": 256, "T": 8, "num_warps": 4}


def constants(weight: Tensor, sequence_ids: Tensor | None) -> dict[str, int | bool]:
    """The constants of the kernels."""
    channels, _, width = weight.shape
    return {"K": width, "HAS_RUNS": sequence_ids is not None, "EVEN": channels % CHANNELS == 0, "BC": CHANNELS}


def grid(x: Tensor, segment: int) -> tuple[int, tuple[int]]:
    """The segments of the tokens of x [B, N, C], and the number of programs for these segments and blocks of channels."""
    segments = cdiv(x.shape[1], segment)
    return segments, (x.shape[0] * segments * cdiv(x.shape[2], CHANNELS),)


def convolve(
    x: Tensor, first_x: int, weight: Tensor, runs: Tensor | None, y: Tensor, first_y: int, before: int, backward: bool
) -> None:
    """Fill y: with SiLU of the convolution of x, or backward with its transpose. x and y start at different positions."""
    segments, programs = grid(y, CONVOLVE["SEGMENT"])
    convolve_kernel[programs](
        x, weight, weight if runs is None else runs, y, *x.stride()[:2], *y.stride()[:2],
        0 if runs is None else runs.stride(0), first_x, x.shape[1], first_y, y.shape[1], y.shape[2], before, segments,
        DIRECTION=-1 if backward else 1, ACTIVATE=not backward, **constants(weight, runs), **CONVOLVE,
    )  # fmt: skip


# Opaque to torch.compile and torch.export. Defined and implemented in two steps: the decorator that does both adds 0.1 ms to
# every call.
INPUTS = "Tensor inputs, Tensor weight, Tensor? sequence_ids"
OPTIONS = "int before, int first"

torch.library.define("gma_hf::short_convolution", f"({INPUTS}, {OPTIONS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "gma_hf::short_convolution_backward",
    f"({INPUTS}, Tensor grad_outputs, {OPTIONS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def prepared(inputs: Tensor, weight: Tensor, sequence_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the form that the kernels read."""
    return row_contiguous(inputs), weight.contiguous(), None if sequence_ids is None else sequence_ids.contiguous()


def empty_outputs(inputs: Tensor, first: int) -> Tensor:
    return inputs.new_empty(inputs.shape[0], inputs.shape[1] - first, inputs.shape[2])


@torch.library.impl("gma_hf::short_convolution", "default")
@on_one_device
@on_its_device
def convolution_forward(inputs, weight, sequence_ids, before, first):
    """The outputs."""
    outputs = empty_outputs(inputs, first)
    if outputs.numel() > 0:
        x, weight, runs = prepared(inputs, weight, sequence_ids)
        convolve(x, 0, weight, runs, outputs, first, before, backward=False)
    return outputs


@torch.library.register_fake("gma_hf::short_convolution")
@on_one_device
def _(inputs, weight, sequence_ids, before, first):
    return empty_outputs(inputs, first)


@torch.library.impl("gma_hf::short_convolution_backward", "default")
@on_one_device
@on_its_device
def convolution_backward(inputs, weight, sequence_ids, grad_outputs, before, first):
    """Gradients of inputs and weight."""
    grad_inputs = inputs.new_empty(inputs.shape)
    if grad_outputs.numel() == 0:
        return grad_inputs.zero_(), weight.new_zeros(weight.shape)
    x, weight, runs = prepared(inputs, weight, sequence_ids)
    grad_outputs = row_contiguous(grad_outputs)
    length, channels = grad_outputs.shape[1:]
    segments, programs = grid(grad_outputs, GRADIENT["SEGMENT"])
    grad_sums = empty_outputs(inputs, first)
    grad_weight = weight.new_empty(inputs.shape[0] * segments, weight.shape[-1], channels, dtype=torch.float32)
    grad_kernel[programs](
        x, weight, weight if runs is None else runs, grad_outputs, grad_sums, grad_weight,
        *x.stride()[:2], *grad_outputs.stride()[:2], *grad_sums.stride()[:2], 0 if runs is None else runs.stride(0),
        x.shape[1], first, length, channels, before, segments, **constants(weight, runs), **GRADIENT,
    )  # fmt: skip
    convolve(grad_sums, first, weight, runs, grad_inputs, 0, before, backward=True)
    return grad_inputs, grad_weight.sum(dim=0).t().to(weight.dtype).unsqueeze(1).contiguous()


@torch.library.register_fake("gma_hf::short_convolution_backward")
@on_one_device
def _(inputs, weight, sequence_ids, grad_outputs, before, first):
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape)


for name in ("short_convolution", "short_convolution_backward"):
    vmapped_by_loops(name)


class ShortConvolution(torch.autograd.Function):
    """The operator with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs, weight, sequence_ids, before, first):
        return torch.ops.gma_hf.short_convolution(inputs, weight, sequence_ids, before, first)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx, grad_outputs):
        grads = differentiate_once(
            torch.ops.gma_hf.short_convolution_backward, *ctx.saved_tensors, grad_outputs, *ctx.options
        )
        return *grads, None, None, None


def short_convolution(inputs: Tensor, weight: Tensor, sequence_ids: Tensor | None, before: int, first: int) -> Tensor:
    """
    SiLU(sum_j weight_j inputs_{p + j - before}) at the positions p from `first` on.

    Args:
        inputs (`torch.Tensor` of shape `(batch, length, channels)`): one row per token. There are no tokens outside of the
            row.
        weight (`torch.Tensor` of shape `(channels, 1, width)`): one weight per tap.
        sequence_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): packed sequences, which do not see each
            other.
        before (`int`): number of taps that look back.
        first (`int`): position of the first output.

    Returns:
        `torch.Tensor` of shape `(batch, length - first, channels)`: the outputs, in the dtype of `inputs`, or of autocast as
        from `conv1d`.
    """
    device_type = inputs.device.type
    if torch.is_autocast_enabled(device_type):
        inputs = inputs.to(torch.get_autocast_dtype(device_type))
    return ShortConvolution.apply(inputs, weight, sequence_ids, before, first)
