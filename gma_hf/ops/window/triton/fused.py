# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The two passes of `window_softmax` by its kernels: block sizes, memory, launches.

query [B, HQ, N, D], key [B, HK, NK, D], value [B, HK, NK, DV], valid [B or 1, NK], runs [B, NK], read [B, HQ, NM, DV],
log_weight [B, HQ, NM], memory_bias and sinks [HQ], memory_query [HQ, D], weighing_query [B, HQ, N, D], sink_key [B, HK, S, D],
sink_value [B, HK, S, DV], visible [B or 1, NS, S].
"""

import torch
from torch import Tensor

from ...attention.triton.launching import empty_output, on_its_device, row_contiguous, strides
from ...attention.triton.plan import INTERPRETED, cdiv, padded
from .kernels import LOG2E, attend_kernel, grad_keys_kernel, grad_queries_kernel


# (queries, keys, warps, stages) of the blocks by the larger padded dimension
FORWARD = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)}
BACKWARD = {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)}
EXACT_FORWARD = {64: (64, 32, 4, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 1)}
EXACT_BACKWARD = {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}
FEW_QUERIES = 16  # decoding: the least that matrix units multiply


def blocks_of(tables: tuple[dict, dict], query: Tensor, value: Tensor) -> tuple[int, int, dict[str, int]]:
    """Queries and keys of a block, and launch options; `tables` are for 16-bit and for float32 inputs."""
    table = tables[torch.float32 in (query.dtype, value.dtype)]
    queries, keys, warps, stages = table[max(64, padded(query.shape[-1]), padded(value.shape[-1]))]
    return queries, keys, {"num_warps": warps, "num_stages": stages}


def constants(
    query: Tensor, key: Tensor, value: Tensor, valid, runs, causal: bool, softcap
) -> dict[str, int | bool | str]:
    """The constants of the kernels."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "R": query.shape[1] // key.shape[1],
        "DP": padded(dim),
        "DVP": padded(value_dim),
        "EVEN_D": dim == padded(dim),
        "EVEN_V": value_dim == padded(value_dim),
        "CAUSAL": causal,
        "HAS_VALID": valid is not None,
        "HAS_RUNS": runs is not None,
        "SOFTCAP": softcap is not None,
        "PRECISION": "ieee" if INTERPRETED else "tf32x3",
    }


def constants_of_queries(weighing_query, sink_key, visible) -> dict[str, bool]:
    """The further constants of kernels that loop over queries."""
    return {
        "HAS_WEIGHING": weighing_query is not None,
        "HAS_SINK_TOKENS": sink_key is not None,
        "HAS_VISIBLE": visible is not None,
    }


def logit_scales(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Base 2: q . k times the first; with a cap, the second times the hyperbolic tangent of the product."""
    log2e = LOG2E.value
    return (scaling * log2e, 0.0) if softcap is None else (scaling / softcap, softcap * log2e)


def row_stride(mask: Tensor | None) -> int:
    """Stride of the rows of `valid`, `runs` or `visible`; 0 if all rows share one."""
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def row_contiguous_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else row_contiguous(x)


def places_of(
    query: Tensor, key: Tensor, read: Tensor, sink_key: Tensor | None, visible: Tensor | None
) -> tuple[int, ...]:
    """N, NK, how many queries have no memory, how many see no sink tokens for certain, and S."""
    length = query.shape[2]
    blind = 0 if visible is None else length - visible.shape[1]
    return length, key.shape[2], length - read.shape[2], blind, 0 if sink_key is None else sink_key.shape[2]


@on_its_device
def forward(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sink_key, sink_value,
    visible, sinks, size, causal, scaling, softcap,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, HQ, N, DV] in the dtype of value, and l [B, HQ, N] in float32."""
    batch, heads, length, dim = query.shape
    query, key, value, read = (row_contiguous(x) for x in (query, key, value, read))
    weighing_query, sink_key, sink_value = (row_contiguous_or_none(x) for x in (weighing_query, sink_key, sink_value))
    valid, runs, visible = contiguous(valid), contiguous(runs), contiguous(visible)
    block, key_block, options = blocks_of((FORWARD, EXACT_FORWARD), query, value)
    block = FEW_QUERIES if length <= FEW_QUERIES else block
    blocks = cdiv(length, block)
    output = empty_output(query, value)
    log_sum = query.new_empty(batch, heads, length, dtype=torch.float32)
    attend_kernel[(batch * heads * blocks,)](
        query, key, value, valid, runs, read, log_weight, weighing_query, memory_bias.contiguous(),
        memory_query.contiguous(), contiguous(sinks), sink_key, sink_value, visible, output, log_sum,
        *strides(query), *strides(key), *strides(value), *strides(read), *log_weight.stride(), *strides(output),
        *strides(weighing_query), *strides(sink_key), *strides(sink_value),
        row_stride(valid), row_stride(runs), row_stride(visible), *places_of(query, key, read, sink_key, visible),
        dim, value.shape[-1], heads, size, blocks, *logit_scales(scaling, softcap),
        BM=block, BN=key_block, HAS_SINKS=sinks is not None,
        **constants(query, key, value, valid, runs, causal, softcap),
        **constants_of_queries(weighing_query, sink_key, visible), **options,
    )  # fmt: skip
    return output, log_sum


def empty_grads(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Memory for the gradients of tensors with tokens: as dense as the inputs, in the same order."""
    return tuple(torch.empty_like(row_contiguous(x)) for x in inputs)


@on_its_device
def backward(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sink_key, sink_value,
    visible, output, log_sum, grad_output, size, causal, scaling, softcap,
) -> tuple[Tensor, ...]:  # fmt: skip
    """
    dq, dk, dv, dr, and in float32 dm [B, HQ, N], du [HQ, D] and delta [B, HQ, N]; the gradient of `weighing_query`; dk and
    dv of the sink tokens, [B, HK, S, D + DV] in float32. The last two have size 0 if they do not exist.
    """
    batch, heads, length, dim = query.shape
    value_dim, key_heads = value.shape[-1], key.shape[1]
    query, key, value, read, grad_output = (row_contiguous(x) for x in (query, key, value, read, grad_output))
    weighing_query, sink_key, sink_value = (row_contiguous_or_none(x) for x in (weighing_query, sink_key, sink_value))
    valid, runs, visible = contiguous(valid), contiguous(runs), contiguous(visible)
    block, key_block, options = blocks_of((BACKWARD, EXACT_BACKWARD), query, value)
    blocks = cdiv(length, block)
    grad_query, grad_key, grad_value, grad_read = empty_grads(query, key, value, read)
    grad_logit, delta = torch.empty_like(log_sum), torch.empty_like(log_sum)
    grad_weighing = log_sum.new_empty(0) if weighing_query is None else torch.empty_like(weighing_query)
    grad_slope = log_sum.new_empty(batch, heads, blocks, dim)
    places = places_of(query, key, read, sink_key, visible)
    # Of every block of queries, added up below
    grad_sinks = None
    if sink_key is not None:
        grad_sinks = log_sum.new_empty(batch, heads, blocks, sink_key.shape[2], dim + value_dim)
    named = constants(query, key, value, valid, runs, causal, softcap) | options
    sizes = (dim, value_dim, heads, size)
    scales = (scaling, *logit_scales(scaling, softcap))
    grad_queries_kernel[(batch * heads * blocks,)](
        query, key, value, valid, runs, read, log_weight, weighing_query, memory_bias.contiguous(),
        memory_query.contiguous(), sink_key, sink_value, visible, output, log_sum, grad_output,
        grad_query, grad_read, grad_logit, grad_weighing, grad_slope, grad_sinks, delta,
        *strides(query), *strides(key), *strides(value), *strides(read), *log_weight.stride(), *strides(output),
        *strides(weighing_query), *strides(sink_key), *strides(sink_value),
        *strides(grad_output), *strides(grad_query), *strides(grad_read),
        *strides(None if weighing_query is None else grad_weighing),
        row_stride(valid), row_stride(runs), row_stride(visible), *places, *sizes, blocks, *scales,
        BM=block, BN=key_block, **constants_of_queries(weighing_query, sink_key, visible), **named,
    )  # fmt: skip
    key_blocks = cdiv(key.shape[2], key_block)
    grad_keys_kernel[(batch * key_heads * key_blocks,)](
        query, key, value, valid, runs, log_sum, grad_output, delta, grad_key, grad_value,
        *strides(query), *strides(key), *strides(value), *strides(grad_output), *strides(grad_key),
        *strides(grad_value), row_stride(valid), row_stride(runs), *places[:2], *sizes, key_blocks, *scales,
        BM=block, BN=key_block, **named,
    )  # fmt: skip
    if grad_sinks is None:
        grad_sinks = log_sum.new_empty(0)
    else:
        grad_sinks = grad_sinks.view(batch, key_heads, -1, *grad_sinks.shape[3:]).sum(dim=2)
    grad_slope = grad_slope.sum(dim=(0, 2))
    return grad_query, grad_key, grad_value, grad_read, grad_logit, grad_slope, delta, grad_weighing, grad_sinks
