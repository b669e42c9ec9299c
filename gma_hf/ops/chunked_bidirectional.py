# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Bidirectional attention in two steps, forward and backward.

    write:  S = S_0 + sum_j w_j gamma^K_j v_j^T,        z likewise with v_j = 1
    read:   o_i = gamma^Q_i S / D_i,                    D_i = gamma^Q_i z + eps

Backwards, with dS, dz the gradients of the state, dn_i = do_i / D_i and dD_i = -(dn_i . gamma^Q_i S) / D_i:

    read:   dgamma^Q_i = S dn_i + z dD_i                dS = sum_i gamma^Q_i dn_i^T,    dz = sum_i gamma^Q_i dD_i
    write:  d(w_j gamma^K_j) = dS v_j + dz              dv_j = dS^T w_j gamma^K_j

Only the inputs and one state are kept; responsibilities are computed again. Shapes as in `chunked_blocks`, with blocks
of one chunk: n = 1.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked_blocks import Block, single_chunk_blocks
from .mixture import MixtureCoefficients, posterior, posterior_backward


def block_writes(
    block: Block, key: Tensor, value: Tensor, coefficients: MixtureCoefficients, write_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Centred keys, their responsibilities, what they write, the values and the write weight of a block."""
    dtype = coefficients.centre.dtype
    key = block.centred_keys(key, coefficients.centre)
    gamma_key = posterior(key, coefficients)
    value = block.of_keys(value, key.shape[0]).to(dtype).contiguous()
    if write_weight is None:
        return key, gamma_key, gamma_key, value, None
    write_weight = block.of(write_weight).to(dtype).unsqueeze(-1)
    return key, gamma_key, gamma_key * write_weight, value, write_weight


class WriteState(torch.autograd.Function):
    """Add what key, value [B, Hk, N, dim] write to the state S [M, B, C, dv], z [M, B, C]."""

    @staticmethod
    def forward(ctx, key, value, centre, linear, quadratic, bias, write_weight, S, z):
        coefficients = MixtureCoefficients(centre, linear, quadratic, bias)
        S, z = S.clone(), z.clone()
        for block in single_chunk_blocks(key.shape[2]):
            _, _, written, block_value, _ = block_writes(block, key, value, coefficients, write_weight)
            S.add_((written.transpose(-1, -2) @ block_value).squeeze(2))
            z.add_(written.sum(dim=(2, 3)))
        ctx.save_for_backward(key, value, *coefficients, write_weight)
        return S, z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_S, grad_z):
        key, value, *rest = ctx.saved_tensors
        coefficients, write_weight = MixtureCoefficients(*rest[:4]), rest[4]
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
        grad_weight = None if write_weight is None else torch.empty_like(write_weight)
        grad_coefficients = [torch.zeros_like(part) for part in coefficients[1:]]
        with torch.autocast(device_type=key.device.type, enabled=False):
            for block in single_chunk_blocks(key.shape[2]):
                x, gamma_key, written, block_value, weight = block_writes(block, key, value, coefficients, write_weight)
                block.put_keys(grad_value, written @ grad_S.unsqueeze(2))
                grad_written = block_value @ grad_S.transpose(-1, -2).unsqueeze(2)
                grad_written.add_(grad_z[:, :, None, None])
                if weight is not None:
                    block.put_keys(grad_weight, (grad_written * gamma_key).sum(dim=-1))
                    grad_written.mul_(weight)
                grad_x, *parts = posterior_backward(grad_written, gamma_key, x, coefficients)
                block.put_keys(grad_key, grad_x)
                for total, part in zip(grad_coefficients, parts, strict=True):
                    total.add_(part)
        return grad_key, grad_value, None, *grad_coefficients, grad_weight, grad_S, grad_z


class ReadState(torch.autograd.Function):
    """Read the state S [M, B, C, dv], z [M, B, C] with query [B, Hq, N, d] -> [B, Hq, N, dv]."""

    @staticmethod
    def forward(ctx, query, centre, linear, quadratic, bias, S, z, eps, dtype):
        coefficients = MixtureCoefficients(centre, linear, quadratic, bias)
        output = query.new_empty(*query.shape[:3], S.shape[-1], dtype=dtype)
        for block in single_chunk_blocks(query.shape[2]):
            gamma_query = posterior(block.centred_queries(query, centre), coefficients)
            read = gamma_query @ S.unsqueeze(2)
            if eps is not None:
                read.div_(gamma_query @ z[:, :, None, :, None] + eps)
            block.put_queries(output, read)
        ctx.save_for_backward(query, *coefficients, S, z)
        ctx.eps = eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, *parts, S, z = ctx.saved_tensors
        coefficients = MixtureCoefficients(*parts)
        grad_query, grad_S, grad_z = torch.empty_like(query), torch.zeros_like(S), torch.zeros_like(z)
        grad_coefficients = [torch.zeros_like(part) for part in coefficients[1:]]
        with torch.autocast(device_type=query.device.type, enabled=False):
            for block in single_chunk_blocks(query.shape[2]):
                x = block.centred_queries(query, coefficients.centre)
                gamma_query = posterior(x, coefficients)
                grad_read = block.of_queries(grad_output, S.shape[0]).to(S.dtype).flatten(3, 4).contiguous()
                if ctx.eps is not None:
                    total = gamma_query @ z[:, :, None, :, None] + ctx.eps
                    grad_read = grad_read / total
                grad_gamma = grad_read @ S.transpose(-1, -2).unsqueeze(2)
                if ctx.eps is not None:
                    # dn_i . gamma^Q_i S = gamma^Q_i . S dn_i
                    grad_total = -(gamma_query * grad_gamma).sum(dim=-1, keepdim=True) / total
                    grad_gamma.addcmul_(grad_total, z[:, :, None, None])
                    grad_z.add_((gamma_query * grad_total).sum(dim=(2, 3)))
                grad_S.add_((gamma_query.transpose(-1, -2) @ grad_read).squeeze(2))
                grad_x, *grads = posterior_backward(grad_gamma, gamma_query, x, coefficients)
                block.put_queries(grad_query, grad_x)
                for accumulated, grad in zip(grad_coefficients, grads, strict=True):
                    accumulated.add_(grad)
        return grad_query, None, *grad_coefficients, grad_S, grad_z, None, None
