# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Bidirectional attention in two steps, forward and backward.

    write:  S = S_0 + sum_j w_j gamma^K_j v_j^T,        z likewise with v_j = 1
    read:   o_i = gamma^Q_i S / D_i,                    D_i = gamma^Q_i z + eps

Backwards, with dS, dz the gradients of the state, dn_i = do_i / D_i and dD_i = -(dn_i . gamma^Q_i S) / D_i, plus the
gradient of D_i where it is an output:

    read:   dgamma^Q_i = S dn_i + z dD_i                dS = sum_i gamma^Q_i dn_i^T,    dz = sum_i gamma^Q_i dD_i
    write:  d(w_j gamma^K_j) = dS v_j + dz              dv_j = dS^T w_j gamma^K_j

With correlation, rho stands for gamma. Only the inputs and one state are kept; responsibilities are computed again. Shapes as
in `blocks`, with blocks of one chunk: n = 1.
"""

import torch
from torch import Tensor

from ...operators import differentiate_once, on_one_device, vmapped_by_loops
from ..mixture import MixtureCoefficients, Route, route, route_backward
from .blocks import Block, contiguous_clone, empty_reads, single_chunk_blocks


def block_writes(
    block: Block,
    key: Tensor,
    value: Tensor,
    coefficients: MixtureCoefficients,
    write_weight: Tensor | None,
    correlate: bool,
) -> tuple[Tensor, Route, Tensor, Tensor, Tensor | None]:
    """Centred keys, their routes, their writes, the values and the write weight of a block."""
    dtype = coefficients.centre.dtype
    write_weight = None if write_weight is None else block.of(write_weight).to(dtype)
    key = block.centred_keys(key, coefficients.centre, write_weight)
    value = block.of_keys(value, key.shape[0], write_weight).to(dtype).contiguous()
    routed = route(key, coefficients, correlate)
    if write_weight is None:
        return key, routed, routed.weights, value, None
    write_weight = write_weight.unsqueeze(-1)
    return key, routed, routed.weights * write_weight, value, write_weight


@torch.library.custom_op(
    "gma_hf::write_state",
    mutates_args=(),
    schema="(Tensor key, Tensor value, Tensor[] coefficients, Tensor? write_weight, Tensor S, Tensor z, bool correlate) "
    "-> (Tensor, Tensor)",
)
@on_one_device
def write_forward(key, value, coefficients, write_weight, S, z, correlate):
    """S and z after all keys."""
    coefficients = MixtureCoefficients(*coefficients)
    S, z = contiguous_clone(S), contiguous_clone(z)
    for block in single_chunk_blocks(key.shape[2]):
        _, _, written, block_value, _ = block_writes(block, key, value, coefficients, write_weight, correlate)
        S.add_((written.transpose(-1, -2) @ block_value).squeeze(2))
        z.add_(written.sum(dim=(2, 3)))
    return S, z


vmapped_by_loops("write_state")


@write_forward.register_fake
@on_one_device
def _(key, value, coefficients, write_weight, S, z, correlate):
    return S.new_empty(S.shape), z.new_empty(z.shape)


@torch.library.custom_op(
    "gma_hf::write_state_backward",
    mutates_args=(),
    schema="(Tensor key, Tensor value, Tensor[] coefficients, Tensor? write_weight, Tensor grad_S, Tensor grad_z, "
    "bool correlate) -> Tensor[]",
)
@on_one_device
def write_backward(key, value, coefficients, write_weight, grad_S, grad_z, correlate):
    """Gradients of key, value, linear, quadratic, bias and, where given, write_weight."""
    coefficients = MixtureCoefficients(*coefficients)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    grad_weight = None if write_weight is None else torch.empty_like(write_weight)
    grad_coefficients = [torch.zeros_like(part) for part in coefficients[1:]]
    with torch.autocast(device_type=key.device.type, enabled=False):
        for block in single_chunk_blocks(key.shape[2]):
            x, routed, written, block_value, weight = block_writes(
                block, key, value, coefficients, write_weight, correlate
            )
            block.put_keys(grad_value, written @ grad_S.unsqueeze(2))
            grad_written = block_value @ grad_S.transpose(-1, -2).unsqueeze(2)
            grad_written.add_(grad_z[:, :, None, None])
            if weight is not None:
                block.put_keys(grad_weight, (grad_written * routed.weights).sum(dim=-1))
                grad_written.mul_(weight)
            grad_x, *parts = route_backward(grad_written, routed, x, coefficients)
            block.put_keys(grad_key, grad_x)
            for total, part in zip(grad_coefficients, parts, strict=True):
                total.add_(part)
    return [grad_key, grad_value, *grad_coefficients, *([] if grad_weight is None else [grad_weight])]


vmapped_by_loops("write_state_backward")


@write_backward.register_fake
@on_one_device
def _(key, value, coefficients, write_weight, grad_S, grad_z, correlate):
    inputs = [key, value, *coefficients[1:], *([] if write_weight is None else [write_weight])]
    return [torch.empty_like(x) for x in inputs]


@torch.library.custom_op(
    "gma_hf::read_state",
    mutates_args=(),
    schema="(Tensor query, Tensor[] coefficients, Tensor S, Tensor z, float? eps, ScalarType dtype, "
    "bool output_normalizer, bool correlate) -> (Tensor, Tensor)",
)
@on_one_device
def read_forward(query, coefficients, S, z, eps, dtype, output_normalizer, correlate):
    """The reads of all queries, in `dtype`, and D (of size 0 unless `output_normalizer`)."""
    coefficients = MixtureCoefficients(*coefficients)
    output, normalizer = empty_reads(query, S, dtype, output_normalizer)
    for block in single_chunk_blocks(query.shape[2]):
        gamma_query = route(block.centred_queries(query, coefficients.centre), coefficients, correlate).weights
        read = gamma_query @ S.unsqueeze(2)
        if eps is not None:
            total = gamma_query @ z[:, :, None, :, None] + eps
            read.div_(total)
            if output_normalizer:
                block.put_queries(normalizer.unsqueeze(-1), total)
        block.put_queries(output, read)
    return output, normalizer


vmapped_by_loops("read_state")


@read_forward.register_fake
@on_one_device
def _(query, coefficients, S, z, eps, dtype, output_normalizer, correlate):
    return empty_reads(query, S, dtype, output_normalizer)


@torch.library.custom_op(
    "gma_hf::read_state_backward",
    mutates_args=(),
    schema="(Tensor query, Tensor[] coefficients, Tensor S, Tensor z, Tensor grad_output, Tensor? grad_normalizer, "
    "float? eps, bool correlate) -> Tensor[]",
)
@on_one_device
def read_backward(query, coefficients, S, z, grad_output, grad_normalizer, eps, correlate):
    """Gradients of query, linear, quadratic, bias, S and z."""
    coefficients = MixtureCoefficients(*coefficients)
    grad_query, grad_S, grad_z = torch.empty_like(query), torch.zeros_like(S), torch.zeros_like(z)
    grad_coefficients = [torch.zeros_like(part) for part in coefficients[1:]]
    with torch.autocast(device_type=query.device.type, enabled=False):
        for block in single_chunk_blocks(query.shape[2]):
            x = block.centred_queries(query, coefficients.centre)
            routed = route(x, coefficients, correlate)
            gamma_query = routed.weights
            grad_read = block.of_queries(grad_output, S.shape[0]).to(S.dtype).flatten(3, 4).contiguous()
            if eps is not None:
                total = gamma_query @ z[:, :, None, :, None] + eps
                grad_read = grad_read / total
            grad_gamma = grad_read @ S.transpose(-1, -2).unsqueeze(2)
            if eps is not None:
                # dn_i . gamma^Q_i S = gamma^Q_i . S dn_i
                grad_total = -(gamma_query * grad_gamma).sum(dim=-1, keepdim=True) / total
                if grad_normalizer is not None:
                    grad_total += block.of_queries(grad_normalizer.unsqueeze(-1), S.shape[0]).flatten(3, 4)
                grad_gamma.addcmul_(grad_total, z[:, :, None, None])
                grad_z.add_((gamma_query * grad_total).sum(dim=(2, 3)))
            grad_S.add_((gamma_query.transpose(-1, -2) @ grad_read).squeeze(2))
            grad_x, *parts = route_backward(grad_gamma, routed, x, coefficients)
            block.put_queries(grad_query, grad_x)
            for accumulated, part in zip(grad_coefficients, parts, strict=True):
                accumulated.add_(part)
    return [grad_query, *grad_coefficients, grad_S, grad_z]


vmapped_by_loops("read_state_backward")


@read_backward.register_fake
@on_one_device
def _(query, coefficients, S, z, grad_output, grad_normalizer, eps, correlate):
    return [torch.empty_like(x) for x in (query, *coefficients[1:], S, z)]


def write_gradients(key, value, centre, linear, quadratic, bias, *arguments):
    """`write_backward` of single tensors."""
    return write_backward(key, value, [centre, linear, quadratic, bias], *arguments)


def read_gradients(query, centre, linear, quadratic, bias, *arguments):
    """`read_backward` of single tensors."""
    return read_backward(query, [centre, linear, quadratic, bias], *arguments)


class WriteState(torch.autograd.Function):
    """Add the writes of key, value [B, Hk, N, dim] to the state S [M, B, C, dv], z [M, B, C]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key, value, centre, linear, quadratic, bias, write_weight, S, z, correlate):
        return write_forward(key, value, [centre, linear, quadratic, bias], write_weight, S, z, correlate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.correlate = inputs[9]

    @staticmethod
    def backward(ctx, grad_S, grad_z):
        key, value, *coefficients, write_weight = ctx.saved_tensors
        grads = differentiate_once(
            write_gradients, key, value, *coefficients, write_weight, grad_S, grad_z, ctx.correlate
        )
        grad_weight = None if write_weight is None else grads[5]
        return *grads[:2], None, *grads[2:5], grad_weight, grad_S, grad_z, None


class ReadState(torch.autograd.Function):
    """Read the state S [M, B, C, dv], z [M, B, C] with query [B, Hq, N, d] -> [B, Hq, N, dv], and D [B, Hq, N]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query, centre, linear, quadratic, bias, S, z, eps, dtype, output_normalizer, correlate):
        coefficients = [centre, linear, quadratic, bias]
        return read_forward(query, coefficients, S, z, eps, dtype, output_normalizer, correlate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        _, ctx.output_normalizer, ctx.correlate = inputs[8:]
        ctx.eps = inputs[7]

    @staticmethod
    def backward(ctx, grad_output, grad_normalizer):
        query, *coefficients, S, z = ctx.saved_tensors
        grad_normalizer = grad_normalizer if ctx.output_normalizer else None
        grads = differentiate_once(
            read_gradients, query, *coefficients, S, z, grad_output, grad_normalizer, ctx.eps, ctx.correlate
        )
        return grads[0], None, *grads[1:], None, None, None, None
