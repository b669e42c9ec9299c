# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The fused kernels as operators that PyTorch knows: what they allocate, how they are launched, how they differentiate.

forward:   coefficients -> what every segment writes -> running sum -> outputs
backward:  coefficients -> what every segment of do writes -> running sum -> gradients -> gradients of the parameters

query [B, HQ, NQ, D], key [B, HK, N, D], value [B, HK, N, DV], mixtures M -> output [B, HQ, NQ, DV], S [B, M, C, DV],
z [B, M, C] float32.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .coefficients import coefficients_backward_kernel, coefficients_kernel
from .gradients import gradient_kernel
from .outputs import read_kernel
from .plan import Plan, make_plan, segment_length, workers_per_mixture
from .states import scan_kernel, write_kernel


class Coefficients(NamedTuple):
    """The mixture in the layout of `coefficients`."""

    weights: Tensor
    bias: Tensor


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and token; a head stride of 0 where all heads share one."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def full_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token."""
    return x.stride(0), x.stride(1), x.stride(2)


def row_contiguous(x: Tensor) -> Tensor:
    """x, copied if the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def prepare_coefficients(plan: Plan, means: Tensor, raw_variances: Tensor, prior_logits: Tensor, floor: float):
    """Run `coefficients_kernel`."""
    mixtures, components, dim = means.shape
    if plan.exact:
        weights = means.new_empty(mixtures, 2, plan.CP, plan.DP, dtype=torch.float32)
    else:
        weights = means.new_empty(mixtures, 4, plan.CP, plan.DP, dtype=torch.bfloat16)
    bias = means.new_empty(mixtures, plan.CP, dtype=torch.float32)
    coefficients_kernel[(mixtures,)](
        means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(), weights, bias,
        floor, components, dim, CP=plan.CP, DP=plan.DP, BD=min(plan.BD, 4096 // plan.CP), EXACT=plan.exact,
    )  # fmt: skip
    return Coefficients(weights, bias)


def to_slabs(plan: Plan, S: Tensor, z: Tensor) -> Tensor:
    """S [B, M, C, DV], z [B, M, C] -> [B * M * NV, CP * (BV + 1)]."""
    batch, mixtures, components, dim = S.shape
    slabs = S.new_zeros(batch, mixtures, plan.NV, plan.CP * (plan.BV + 1), dtype=torch.float32)
    padded = slabs[..., : plan.CP * plan.BV].unflatten(-1, (plan.CP, plan.BV))
    for v in range(plan.NV):
        block = S[..., v * plan.BV : (v + 1) * plan.BV]
        padded[:, :, v, :components, : block.shape[-1]] = block
    slabs[..., plan.CP * plan.BV :][..., :components] = z.unsqueeze(2)
    return slabs.flatten(0, 2)


def from_slabs(plan: Plan, slabs: Tensor, batch: int, components: int, dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of `to_slabs`: always a copy, so that nobody holds on to the padding."""
    slabs = slabs.unflatten(0, (batch, -1, plan.NV))
    S = slabs[..., : plan.CP * plan.BV].unflatten(-1, (plan.CP, plan.BV))[..., :components, :]
    S = S.movedim(2, 3).flatten(3)[..., :dim]
    z = slabs[:, :, 0, plan.CP * plan.BV :][..., :components]
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in (S, z))


def scan(states: Tensor, decays: Tensor | None, first: Tensor | None, reverse: bool, slabs_per_decay: int) -> Tensor:
    """Run `scan_kernel` in place on states [slabs, segments, size]; the state at the end."""
    slabs, segments, size = states.shape
    last = states.new_empty(slabs, size)
    block = 256
    scan_kernel[(slabs, triton.cdiv(size, block))](
        states, decays, first, last, segments, size, slabs_per_decay,
        BLOCK=block, REVERSE=reverse, HAS_DECAY=decays is not None, HAS_FIRST=first is not None, num_warps=2,
    )  # fmt: skip
    return last


def write(plan, coefficients, x, y, output, rd, write_weight, log_decay, lse, mixtures, repeats, first, reverse):
    """States at the borders of the segments [slabs, segments, size], the state at the end, tokens per segment."""
    batch, _, length, dim = x.shape
    per_segment = segment_length(plan, batch * mixtures, length, x.device)
    segments = max(1, triton.cdiv(length, per_segment * plan.T))
    states = x.new_empty(batch * mixtures * plan.NV, segments, plan.CP * (plan.BV + 1), dtype=torch.float32)
    decays = x.new_empty(batch * mixtures, segments, dtype=torch.float32)
    write_kernel[(batch * mixtures * plan.NV * segments,)](
        x, y, output, rd, write_weight, log_decay, *coefficients, states, decays, lse,
        *strides(x), *strides(y), *strides(output), *strides(write_weight), *strides(log_decay),
        length, dim, y.shape[-1], mixtures, segments, per_segment,
        mixtures * repeats // x.shape[1], mixtures * repeats // y.shape[1],
        R=repeats, REVERSE=reverse, HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None,
        NORMALIZE=rd is not None, **plan.constants(dim, y.shape[-1]), **plan.write,
    )  # fmt: skip
    last = scan(states, decays if log_decay is not None else None, first, reverse, plan.NV)
    return states, last, per_segment


@torch.library.custom_op(
    "gma_hf::fused_attention",
    mutates_args=(),
    device_types=None,
    schema="(Tensor query, Tensor key, Tensor value, Tensor means, Tensor raw_variances, Tensor prior_logits, "
    "Tensor? write_weight, Tensor? log_decay, Tensor? S, Tensor? z, bool causal, bool strict, float? eps, "
    "float variance_floor, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def fused_attention(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
    variance_floor, save,
):  # fmt: skip
    """Output, S, z, and for the backward pass: lse of queries and keys, 1 / D, the last state, states of the chunks."""
    batch, query_heads, query_length, dim = query.shape
    mixtures, components, _ = means.shape
    value_dim, repeats = value.shape[-1], query_heads // mixtures
    query, key, value = row_contiguous(query), row_contiguous(key), row_contiguous(value)
    plan = make_plan(query.dtype, components, dim, value_dim)
    coefficients = prepare_coefficients(plan, means, raw_variances, prior_logits, variance_floor)
    lse_key = query.new_empty(batch, mixtures, key.shape[2], dtype=torch.float32)
    first = None if S is None else to_slabs(plan, S, z)
    states, last, per_segment = write(
        plan, coefficients, key, value, None, None, write_weight, log_decay, lse_key, mixtures, 1, first, False
    )
    if not causal:
        per_segment = segment_length(plan, batch * mixtures, query_length, query.device)
    segments = max(1, triton.cdiv(query_length, per_segment * plan.T))
    output = value.new_empty(batch, query_length, query_heads, value_dim).transpose(1, 2)
    saved = saved_tensors(plan, query, mixtures, causal, eps is not None, save)
    lse_query, rd, chunk_states, chunk_norms, chunk_scales = saved
    read_kernel[(batch * mixtures * plan.NV * segments,)](
        query, key, value, output, rd, write_weight, log_decay, *coefficients, states if causal else last,
        lse_query, lse_key, chunk_states, chunk_norms, chunk_scales,
        *strides(query), *strides(key), *strides(value), *strides(output), *strides(write_weight),
        *strides(log_decay), states.stride(0) if causal else last.stride(0),
        query_length, dim, value_dim, mixtures, segments, per_segment, triton.cdiv(query_length, plan.T),
        mixtures // key.shape[1], 0.0 if eps is None else eps,
        R=repeats, CAUSAL=causal, STRICT=strict, HAS_WEIGHT=write_weight is not None,
        HAS_DECAY=log_decay is not None, NORMALIZE=eps is not None, SAVE=save,
        **plan.constants(dim, value_dim), **plan.read,
    )  # fmt: skip
    return output, *from_slabs(plan, last, batch, components, value_dim), lse_query, lse_key, rd, last, *saved[2:]


def saved_tensors(plan, query, mixtures, causal, normalize, save):
    """Empty lse and 1 / D [B, HQ, N], and states, z, scales of the chunks [slabs, chunks, ...]; of size 0 if unused."""
    batch, query_heads, length, _ = query.shape
    slabs = batch * mixtures * plan.NV if save and causal else 0
    chunks = (length + plan.T - 1) // plan.T
    state_dtype = torch.float32 if plan.exact else torch.float16
    return (
        query.new_empty(batch if save else 0, query_heads, length, dtype=torch.float32),
        query.new_empty(batch if save and normalize else 0, query_heads, length, dtype=torch.float32),
        query.new_empty(slabs, chunks, plan.CP, plan.BV, dtype=state_dtype),
        query.new_empty(slabs, chunks, plan.CP, dtype=torch.float32),
        query.new_empty(slabs, chunks, dtype=torch.float32),
    )


@fused_attention.register_fake
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
    variance_floor, save,
):  # fmt: skip
    batch, query_heads, query_length, dim = query.shape
    mixtures, components, _ = means.shape
    value_dim = value.shape[-1]
    plan = make_plan(query.dtype, components, dim, value_dim)
    output = value.new_empty(batch, query_length, query_heads, value_dim).transpose(1, 2)
    new = query.new_empty
    S = new(batch, mixtures, components, value_dim, dtype=torch.float32)
    z = new(batch, mixtures, components, dtype=torch.float32)
    lse_key = new(batch, mixtures, key.shape[2], dtype=torch.float32)
    last = new(batch * mixtures * plan.NV, plan.CP * (plan.BV + 1), dtype=torch.float32)
    saved = saved_tensors(plan, query, mixtures, causal, eps is not None, save)
    return output, S, z, saved[0], lse_key, saved[1], last, *saved[2:]


@torch.library.custom_op(
    "gma_hf::fused_attention_backward",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor means, Tensor raw_variances, Tensor prior_logits, "
    "Tensor? write_weight, Tensor? log_decay, Tensor output, Tensor lse_query, Tensor lse_key, Tensor rd, Tensor last, "
    "Tensor chunk_states, Tensor chunk_norms, Tensor chunk_scales, Tensor grad_output, Tensor? grad_S, "
    "Tensor? grad_z, bool causal, bool strict, bool normalize, bool grad_weight, float variance_floor) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def fused_attention_backward(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, output, lse_query, lse_key, rd,
    last, chunk_states, chunk_norms, chunk_scales, grad_output, grad_S, grad_z, causal, strict, normalize, grad_weight,
    variance_floor,
):  # fmt: skip
    """Gradients of the inputs in their order, S and z included; of size 0 for write_weight and log_decay if unused."""
    batch, query_heads, query_length, dim = query.shape
    mixtures, components, _ = means.shape
    value_dim, repeats, key_heads = value.shape[-1], query_heads // mixtures, key.shape[1]
    query, key, value, grad_output = (row_contiguous(x) for x in (query, key, value, grad_output))
    plan = make_plan(query.dtype, components, dim, value_dim)
    coefficients = prepare_coefficients(plan, means, raw_variances, prior_logits, variance_floor)
    rd = rd if normalize else None
    first = None
    if grad_S is not None or grad_z is not None:
        shape = (batch, mixtures, components)
        grad_S = last.new_zeros(*shape, value_dim) if grad_S is None else grad_S
        first = to_slabs(plan, grad_S, last.new_zeros(shape) if grad_z is None else grad_z)
        if plan.NV > 1:  # the blocks of the value dimensions add up: z's gradient belongs to one of them
            first.unflatten(0, (-1, plan.NV))[:, 1:, plan.CP * plan.BV :] = 0.0
    grad_states, grad_first, per_segment = write(
        plan, coefficients, query, grad_output, output, rd, None, log_decay, lse_query, mixtures, repeats, first, True
    )

    blocks, key_length = plan.NV, key.shape[2]
    grad_query = torch.empty_like(query) if blocks == 1 else query.new_empty(blocks, *query.shape, dtype=torch.float32)
    shared = mixtures != key_heads  # several mixtures read a key and value head: their gradients are added up below
    grad_key = torch.empty_like(key)
    if shared or blocks > 1:
        grad_key = key.new_empty(blocks, batch, mixtures, key_length, dim, dtype=torch.float32)
    grad_value = torch.empty_like(value)
    if shared:
        grad_value = value.new_empty(batch, mixtures, key_length, value_dim, dtype=torch.float32)
    per_token = lse_key.new_empty(2, batch * mixtures * blocks, key_length)
    query_side = grad_query if grad_query.ndim == 5 else grad_query[None]
    key_side = grad_key if grad_key.ndim == 5 else grad_key[None]

    sides = [(True, True)] if causal else [(True, False), (False, True)]
    lengths = [query_length if with_queries else key_length for with_queries, _ in sides]
    if not causal:
        segment_lengths = [segment_length(plan, batch * mixtures, length, query.device) for length in lengths]
    else:
        segment_lengths = [per_segment]
    segment_counts = [
        max(1, triton.cdiv(length, per * plan.T)) for length, per in zip(lengths, segment_lengths, strict=True)
    ]
    workers = [workers_per_mixture(plan, mixtures, batch * segments, query.device) for segments in segment_counts]
    shape = (sum(workers) * blocks, mixtures, plan.CP, plan.DP)
    # Sums in memory, instead of in registers, start from zero
    new = last.new_empty if plan.DP == plan.BD else last.new_zeros
    grad_linear, grad_quadratic, grad_bias = new(shape), new(shape), last.new_empty(shape[:3])
    done = 0
    for (with_queries, with_keys), length, per, segments, count in zip(
        sides, lengths, segment_lengths, segment_counts, workers, strict=True
    ):
        grads = grad_states if causal else grad_first
        gradient_kernel[(count * mixtures * blocks,)](
            query, key, value, grad_output, rd, write_weight, log_decay, *coefficients, lse_query, lse_key,
            last, chunk_states, chunk_norms, chunk_scales, grads,
            query_side, key_side, grad_value, per_token[0], per_token[1],
            grad_linear[done:], grad_quadratic[done:], grad_bias[done:],
            *strides(query), *strides(key), *strides(value), *strides(grad_output), *strides(write_weight),
            *strides(log_decay), query_side.stride(0), *full_strides(query_side[0]),
            key_side.stride(0), *full_strides(key_side[0]), *full_strides(grad_value),
            last.stride(0), grads.stride(0),
            batch, length, dim, value_dim, mixtures, segments, per, triton.cdiv(length, plan.T),
            mixtures // key_heads, count,
            R=repeats, HAS_QUERIES=with_queries, HAS_KEYS=with_keys, STRICT=strict,
            HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None, NORMALIZE=normalize,
            GRAD_WEIGHT=grad_weight, **plan.constants(dim, value_dim), **plan.gradient,
        )  # fmt: skip
        done += count * blocks

    grad_means, grad_raw, grad_priors = (torch.empty_like(x) for x in (means, raw_variances, prior_logits))
    columns = min(16, plan.DP)
    coefficients_backward_kernel[(mixtures, plan.DP // columns)](
        means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(),
        grad_linear, grad_quadratic, grad_bias, grad_means, grad_raw, grad_priors,
        variance_floor, components, dim, done, mixtures, CP=plan.CP, DP=plan.DP, BD=columns,
    )  # fmt: skip

    if blocks > 1:
        grad_query = grad_query.sum(dim=0).to(query.dtype)
    if grad_key.ndim == 5:
        grad_key = grad_key.sum(dim=0).unflatten(1, (key_heads, -1)).sum(dim=2).to(key.dtype)
    if shared:
        grad_value = grad_value.unflatten(1, (key_heads, -1)).sum(dim=2).to(value.dtype)
    per_token = per_token.unflatten(1, (batch, mixtures, blocks)).sum(dim=3) if blocks > 1 else per_token.unflatten(
        1, (batch, mixtures)
    )
    grad_write_weight = sum_heads(per_token[0], write_weight if grad_weight else None)
    grad_log_decay = sum_heads(per_token[1], log_decay)
    grad_S, grad_z = from_slabs(plan, grad_first, batch, components, value_dim)
    if blocks > 1:
        parts = grad_first.unflatten(0, (batch, mixtures, blocks))[..., plan.CP * plan.BV :]
        grad_z = parts.sum(dim=2)[..., :components].contiguous()
    return (
        grad_query, grad_key, grad_value, grad_means, grad_raw, grad_priors, grad_write_weight, grad_log_decay,
        grad_S, grad_z,
    )  # fmt: skip


def sum_heads(x: Tensor, like: Tensor | None) -> Tensor:
    """Gradients [B, M, N] of what several mixtures share, in the shape and type of the input; of size 0 if unused."""
    if like is None:
        return x.new_empty(0)
    return x.unflatten(1, (like.shape[1], -1)).sum(dim=2).to(like.dtype)


@fused_attention_backward.register_fake
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, output, lse_query, lse_key, rd,
    last, chunk_states, chunk_norms, chunk_scales, grad_output, grad_S, grad_z, causal, strict, normalize, grad_weight,
    variance_floor,
):  # fmt: skip
    batch, mixtures, components, value_dim = query.shape[0], *means.shape[:2], value.shape[-1]
    inputs = (row_contiguous(query), row_contiguous(key), row_contiguous(value), means, raw_variances, prior_logits)
    gates = (write_weight if grad_weight else None, log_decay)
    return (
        *(torch.empty_like(x) for x in inputs),
        *(last.new_empty(0 if x is None else x.shape, dtype=None if x is None else x.dtype) for x in gates),
        last.new_empty(batch, mixtures, components, value_dim),
        last.new_empty(batch, mixtures, components),
    )


def setup_context(ctx, inputs, output):
    """Keep inputs, output and what the forward pass saved for the gradients."""
    *tensors, S, z, ctx.causal, ctx.strict, ctx.eps, ctx.variance_floor, _ = inputs
    ctx.has_state = S is not None
    ctx.state_dtypes = (S.dtype, z.dtype) if ctx.has_state else None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0], *output[3:])


def backward(ctx, grad_output, grad_S, grad_z, *unused):
    """Gradients of `fused_attention`'s arguments."""
    *tensors, output, lse_query, lse_key, rd, last, states, norms, scales = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needs = ctx.needs_input_grad
    grads = torch.ops.gma_hf.fused_attention_backward(
        *tensors, output, lse_query, lse_key, rd, last, states, norms, scales, grad_output, grad_S, grad_z,
        ctx.causal, ctx.strict, ctx.eps is not None, needs[6], ctx.variance_floor,
    )  # fmt: skip
    *grads, grad_S, grad_z = (grad if needed else None for grad, needed in zip(grads, needs, strict=False))
    if ctx.has_state:
        grad_S, grad_z = (
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip((grad_S, grad_z), ctx.state_dtypes, strict=True)
        )
    return *grads, grad_S, grad_z, None, None, None, None, None


fused_attention.register_autograd(backward, setup_context=setup_context)
