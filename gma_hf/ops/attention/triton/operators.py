# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The fused kernels as operators that PyTorch knows: what they allocate, how they are launched, how they differentiate.

forward:   coefficients -> what every segment writes -> running sum -> outputs
backward:  coefficients -> what every segment of do writes -> running sum -> gradients -> gradients of the parameters

query [B, HQ, NQ, D], key [B, HK, N, D], value [B, HK, N, DV], mixtures M -> output [B, HQ, NQ, DV], if asked for the
denominators D [B, HQ, NQ] in float32, S [B, M, C, DV], z [B, M, C] float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .coefficients import coefficients_backward_kernel, coefficients_kernel
from .gradients import gradient_kernel
from .launching import on_its_device
from .outputs import read_kernel
from .plan import Plan, cdiv, fills_chip, make_plan, segment_length, workers_per_mixture
from .states import scan_kernel, write_kernel


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass; of size 0 where nothing needs it."""

    lse_query: Tensor  # [B, HQ, NQ]
    lse_key: Tensor  # [B, M, N]
    rd: Tensor  # [B, HQ, NQ], 1 / D
    last: Tensor  # [B * M * NV, CP * (BV + 1)], the state at the end
    chunk_states: Tensor  # [B * M * NV, chunks, CP, BV], S before every chunk times its scale
    chunk_norms: Tensor  # [B * M * NV, chunks, CP], z
    chunk_scales: Tensor  # [B * M * NV, chunks]
    largest_value: Tensor  # [B * M * NV, chunks of keys]
    largest_weight: Tensor  # [B * M, chunks of keys]
    weights: Tensor  # the mixture in the layout of `coefficients`
    bias: Tensor


def empty_saved(plan, query, key, means, causal, normalize, has_weight, save) -> Saved:
    """The tensors of `Saved`, not filled yet."""
    batch, query_heads, length, _ = query.shape
    mixtures = means.shape[0]
    slabs = batch * mixtures * plan.NV
    chunks, key_chunks = cdiv(length, plan.T), cdiv(key.shape[2], plan.T)
    state_dtype = torch.float32 if plan.exact else torch.float16
    kept = slabs if save and causal else 0
    parts = 2 if plan.exact else 4

    def new(*shape, dtype=torch.float32):
        return query.new_empty(shape, dtype=dtype)

    return Saved(
        new(batch if save else 0, query_heads, length),
        new(batch, mixtures, key.shape[2]),
        new(batch if save and normalize else 0, query_heads, length),
        new(slabs, plan.CP * (plan.BV + 1)),
        new(kept, chunks, plan.CP, plan.BV, dtype=state_dtype),
        new(kept, chunks, plan.CP),
        new(kept, chunks),
        new(slabs, key_chunks),
        new(batch * mixtures if has_weight else 0, key_chunks),
        new(mixtures, parts, plan.CP, plan.DP, dtype=torch.float32 if plan.exact else torch.bfloat16),
        new(mixtures, plan.CP),
    )


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and token; a head stride of 0 where all heads share one."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def block_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of block, batch, head and token of [blocks, B, H, N, D], or of [B, H, N, D], which is one block."""
    return x.stride()[:-1] if x.ndim == 5 else (0, *x.stride()[:-1])


def row_contiguous(x: Tensor) -> Tensor:
    """x, copied if the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def prepare_coefficients(plan: Plan, means: Tensor, raw_variances: Tensor, prior_logits: Tensor, floor: float, saved):
    """Run `coefficients_kernel`."""
    mixtures, components, dim = means.shape
    coefficients_kernel[(mixtures,)](
        means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(), saved.weights, saved.bias,
        floor, components, dim, CP=plan.CP, DP=plan.DP, BD=min(plan.BD, 4096 // plan.CP), EXACT=plan.exact,
    )  # fmt: skip


def to_slabs(plan: Plan, S: Tensor, z: Tensor) -> Tensor:
    """S [B, M, C, DV], z [B, M, C] -> [B * M * NV, CP * (BV + 1)]."""
    batch, mixtures, components, _ = S.shape
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


def scan(states, decays, first, last, reverse, slabs_per_decay) -> None:
    """Run `scan_kernel` in place on states [slabs, segments, size]."""
    slabs, segments, size = states.shape
    block = 128
    scan_kernel[(slabs, cdiv(size, block))](
        states, decays, first, last, segments, size, slabs_per_decay,
        BLOCK=block, ROWS=16, REVERSE=reverse, HAS_DECAY=decays is not None, HAS_FIRST=first is not None, num_warps=1,
    )  # fmt: skip


def write(
    plan, saved, x, y, output, rd, grad_normalizer, write_weight, log_decay, mixtures, repeats, first, last, reverse
):
    """States at the borders of the segments [slabs, segments, size], and chunks per segment; fills `last` as well."""
    batch, _, length, dim = x.shape
    chunks = cdiv(length, plan.T)
    per_segment = segment_length(plan, batch * mixtures, chunks, x.device)
    segments = cdiv(chunks, per_segment)
    states = last.new_empty(batch * mixtures * plan.NV, segments, last.shape[-1])
    decays = last.new_empty(batch * mixtures, segments)
    write_kernel[(batch * mixtures * plan.NV * segments,)](
        x, y, output, rd, grad_normalizer, write_weight, log_decay, saved.weights, saved.bias, states, decays,
        saved.lse_query if reverse else saved.lse_key, saved.largest_value, saved.largest_weight,
        *strides(x), *strides(y), *strides(output), *strides(write_weight), *strides(log_decay),
        length, dim, y.shape[-1], mixtures, segments, per_segment, chunks,
        mixtures * repeats // x.shape[1], mixtures * repeats // y.shape[1],
        R=repeats, REVERSE=reverse, HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None,
        NORMALIZE=rd is not None, HAS_GRAD_NORMALIZER=grad_normalizer is not None,
        **plan.constants(dim, y.shape[-1]), **plan.write,
    )  # fmt: skip
    scan(states, decays if log_decay is not None else None, first, last, reverse, plan.NV)
    return states, per_segment


INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor means, Tensor raw_variances, Tensor prior_logits, "
    "Tensor? write_weight, Tensor? log_decay"
)


# Defined and implemented in two steps: the decorator that does both adds 0.1 ms to every call
torch.library.define(
    "gma_hf::fused_attention",
    f"({INPUTS}, Tensor? S, Tensor? z, bool causal, bool strict, float? eps, float variance_floor, bool save, "
    f"bool final_state, bool output_normalizer) -> ({', '.join(['Tensor'] * (4 + len(Saved._fields)))})",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::fused_attention", ("cpu", "cuda"))
@on_its_device
def fused_attention(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
    variance_floor, save, final_state, output_normalizer,
):  # fmt: skip
    """Output, D (of size 0 unless output_normalizer), S, z (unless final_state) and `Saved` (unless save)."""
    batch, query_heads, length, dim = query.shape
    mixtures, components, _ = means.shape
    value_dim = value.shape[-1]
    query, key, value = row_contiguous(query), row_contiguous(key), row_contiguous(value)
    plan = make_plan(query.dtype, int(components), int(dim), int(value_dim))
    saved = empty_saved(plan, query, key, means, causal, eps is not None, write_weight is not None, save)
    prepare_coefficients(plan, means, raw_variances, prior_logits, variance_floor, saved)
    first = None if S is None else to_slabs(plan, S, z)
    chunks = cdiv(length, plan.T)
    one_pass = causal and fills_chip(plan, batch * mixtures, query.device)
    if one_pass:
        states, per_segment = first, chunks
    else:
        states, per_segment = write(
            plan, saved, key, value, None, None, None, write_weight, log_decay, mixtures, 1, first, saved.last, False
        )  # fmt: skip
    if not causal:
        states, per_segment = saved.last, segment_length(plan, batch * mixtures, chunks, query.device)
    segments = cdiv(chunks, per_segment)
    output, normalizer = empty_output(query, value), empty_normalizer(query, output_normalizer)
    read_kernel[(batch * mixtures * plan.NV * segments,)](
        query, key, value, output, normalizer if output_normalizer else None, saved.rd, write_weight, log_decay,
        saved.weights, saved.bias, states, saved.last, saved.lse_query, saved.lse_key, saved.largest_value, saved.largest_weight, *saved[4:7],
        *strides(query), *strides(key), *strides(value), *strides(output), *strides(write_weight),
        *strides(log_decay), 0 if states is None else states.stride(0),
        length, dim, value_dim, mixtures, segments, per_segment, chunks,
        mixtures // key.shape[1], 0.0 if eps is None else eps,
        R=query_heads // mixtures, CAUSAL=causal, ONE_PASS=one_pass, HAS_STATE=states is not None, STRICT=strict,
        HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None, NORMALIZE=eps is not None,
        OUTPUT_NORMALIZER=output_normalizer, SAVE=save, **plan.constants(dim, value_dim), **plan.read,
    )  # fmt: skip
    if final_state:
        S, z = from_slabs(plan, saved.last, batch, components, value_dim)
    else:
        S, z = saved.last.new_empty(0), saved.last.new_empty(0)
    return output, normalizer, S, z, *(saved if save else nothing_saved(saved.last))


def nothing_saved(like: Tensor) -> Saved:
    """What an inference keeps. Shapes that depend on the number of chunks would keep torch.export from open lengths."""
    return Saved(*(like.new_empty(0) for _ in Saved._fields))


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, HQ, NQ, DV], with the heads of a token side by side: what an output projection reads without a copy."""
    batch, heads, length, _ = query.shape
    return value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def empty_normalizer(query: Tensor, output_normalizer: bool) -> Tensor:
    """[B, HQ, NQ] if it is asked for, else of size 0."""
    return query.new_empty(query.shape[:3] if output_normalizer else 0, dtype=torch.float32)


@torch.library.register_fake("gma_hf::fused_attention")
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
    variance_floor, save, final_state, output_normalizer,
):  # fmt: skip
    (mixtures, components, dim), value_dim = means.shape, value.shape[-1]
    plan = make_plan(query.dtype, int(components), int(dim), int(value_dim))
    single = query.new_empty(0, dtype=torch.float32)
    if save:
        saved = empty_saved(plan, query, key, means, causal, eps is not None, write_weight is not None, save)
    else:
        saved = nothing_saved(single)
    shape = (query.shape[0], mixtures, components)
    S, z = (single.new_empty(size if final_state else 0) for size in ((*shape, value_dim), shape))
    return empty_output(query, value), empty_normalizer(query, output_normalizer), S, z, *saved


class Side(NamedTuple):
    """One launch of the gradient kernel: for the queries, or for the keys and values."""

    queries: bool
    length: int
    per_segment: int
    segments: int
    workers: int


def make_side(plan: Plan, queries: bool, batch: int, mixtures: int, x: Tensor, one_pass: bool) -> Side:
    """The launch for tokens x [B, heads, N, D]."""
    chunks = cdiv(x.shape[2], plan.T)
    per_segment = chunks if one_pass else segment_length(plan, batch * mixtures, chunks, x.device)
    segments = cdiv(chunks, per_segment)
    workers = workers_per_mixture(plan, mixtures, batch * segments, x.device)
    return Side(queries, x.shape[2], per_segment, segments, workers)


def sums_in_registers(plan: Plan, queries: bool, one_pass: bool, has_decay: bool) -> bool:
    """Whether a program keeps the sums of its parameters' gradients in registers, as measured; else they are in memory."""
    if plan.BD < plan.DP:  # blocks of columns take turns in the registers
        return False
    if plan.CP * plan.DP > 4096:
        return not queries
    return queries or not (one_pass or has_decay)


torch.library.define(
    "gma_hf::fused_attention_backward",
    f"({INPUTS}, Tensor output, Tensor grad_output, Tensor? grad_normalizer, Tensor? grad_S, Tensor? grad_z, bool causal, "
    "bool strict, bool normalize, float variance_floor, bool grad_weight, bool grad_state, "
    f"{', '.join(f'Tensor {name}' for name in Saved._fields)}) "
    f"-> ({', '.join(['Tensor'] * 10)})",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::fused_attention_backward", ("cpu", "cuda"))
@on_its_device
def fused_attention_backward(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, output, grad_output,
    grad_normalizer, grad_S, grad_z, causal, strict, normalize, variance_floor, grad_weight, grad_state, *saved,
):  # fmt: skip
    """Gradients of the inputs in their order, S and z included; of size 0 where nothing needs them."""
    batch, query_heads, length, dim = query.shape
    mixtures, components, _ = means.shape
    value_dim, repeats, key_heads, key_length = value.shape[-1], query_heads // mixtures, key.shape[1], key.shape[2]
    query, key, value, grad_output = (row_contiguous(x) for x in (query, key, value, grad_output))
    plan = make_plan(query.dtype, int(components), int(dim), int(value_dim))
    saved, blocks = Saved(*saved), plan.NV
    rd = saved.rd if normalize else None
    grad_normalizer = None if grad_normalizer is None else grad_normalizer.contiguous()
    first = None
    if grad_S is not None or grad_z is not None:
        shape = (batch, mixtures, components)
        grad_S = saved.last.new_zeros(*shape, value_dim) if grad_S is None else grad_S
        first = to_slabs(plan, grad_S, saved.last.new_zeros(shape) if grad_z is None else grad_z)
        # The blocks of the value dimensions add up: z's gradient belongs to one of them
        first.unflatten(0, (-1, blocks))[:, 1:, plan.CP * plan.BV :] = 0.0
    one_pass = causal and fills_chip(plan, batch * mixtures, query.device)
    grad_first = torch.empty_like(saved.last) if grad_state or not one_pass else saved.last
    largest_dn = grad_first.new_empty(batch * query_heads * blocks, cdiv(length, plan.T))
    grad_states = first
    if not one_pass:
        grad_states, _ = write(
            plan, saved, query, grad_output, output if normalize else None, rd, grad_normalizer, None, log_decay,
            mixtures, repeats, first, grad_first, True,
        )  # fmt: skip
    if not causal:
        grad_states = grad_first

    # Partial gradients, added up below: of blocks of the value dimensions, of mixtures that share keys and values
    shared = mixtures != key_heads
    per_block = query.new_empty(blocks, *query.shape, dtype=torch.float32) if blocks > 1 else None
    grad_query = torch.empty_like(query) if per_block is None else per_block
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    if shared or blocks > 1:
        grad_key = key.new_empty(blocks, batch, mixtures, key_length, dim, dtype=torch.float32)
    if shared:
        grad_value = value.new_empty(batch, mixtures, key_length, value_dim, dtype=torch.float32)
    grad_gates = grad_first.new_empty(2, batch, mixtures, blocks, key_length)
    sides = [
        make_side(plan, True, batch, mixtures, query, False),
        make_side(plan, False, batch, mixtures, key, one_pass),
    ]
    dd, reads = grad_first.new_empty(2, batch, query_heads, blocks, length)
    partials = sum(side.workers for side in sides) * blocks
    registers = [sums_in_registers(plan, side.queries, one_pass, log_decay is not None) for side in sides]
    new = grad_first.new_empty if all(registers) else grad_first.new_zeros
    grad_linear, grad_quadratic = (new(partials, mixtures, plan.CP, plan.DP) for _ in range(2))
    grad_bias = grad_first.new_empty(partials, mixtures, plan.CP)
    done = 0
    for side, in_registers in zip(sides, registers, strict=True):
        gradient_kernel[(side.workers * mixtures * blocks,)](
            query, key, value, grad_output, rd, grad_normalizer if side.queries else None, write_weight, log_decay,
            saved.weights, saved.bias, saved.lse_query, saved.lse_key, saved.largest_value, saved.largest_weight, largest_dn, dd, reads,
            *saved[3:7], grad_states, grad_first, grad_query, grad_key, grad_value, *grad_gates,
            grad_linear[done:], grad_quadratic[done:], grad_bias[done:],
            *strides(query), *strides(key), *strides(value), *strides(grad_output), *strides(write_weight),
            *strides(log_decay), *block_strides(grad_query), *block_strides(grad_key), *grad_value.stride()[:3],
            saved.last.stride(0), 0 if grad_states is None else grad_states.stride(0),
            batch, side.length, dim, value_dim, mixtures, side.segments, side.per_segment,
            cdiv(side.length, plan.T), mixtures // key_heads, side.workers,
            R=repeats, CAUSAL=causal, QUERIES=side.queries, HAS_GRAD_STATE=grad_states is not None,
            GRAD_FIRST=one_pass and grad_state, STRICT=strict,
            HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None, NORMALIZE=normalize,
            HAS_GRAD_NORMALIZER=grad_normalizer is not None and side.queries, GRAD_WEIGHT=grad_weight, IN_REGISTERS=in_registers,
            **plan.constants(dim, value_dim), **plan.gradient,
        )  # fmt: skip
        done += side.workers * blocks

    grad_mixture = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (means, raw_variances, prior_logits)
    )
    columns = min(16, plan.DP)
    coefficients_backward_kernel[(mixtures, plan.DP // columns)](
        means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(),
        grad_linear, grad_quadratic, grad_bias, *grad_mixture,
        variance_floor, components, dim, partials, mixtures, CP=plan.CP, DP=plan.DP, BD=columns,
    )  # fmt: skip

    if grad_query.ndim == 5:
        grad_query = laid_out_as(query, grad_query.sum(dim=0))
    if grad_key.ndim == 5:
        grad_key = laid_out_as(key, grad_key.sum(dim=0).unflatten(1, (key_heads, -1)).sum(dim=2))
    if shared:
        grad_value = laid_out_as(value, grad_value.unflatten(1, (key_heads, -1)).sum(dim=2))
    gates = (write_weight if grad_weight else None, log_decay)
    grad_gates = (sum_heads(grad, gate) for grad, gate in zip(grad_gates, gates, strict=True))
    if not grad_state:
        return (
            grad_query,
            grad_key,
            grad_value,
            *grad_mixture,
            *grad_gates,
            grad_first.new_empty(0),
            grad_first.new_empty(0),
        )
    grad_S, grad_z = from_slabs(plan, grad_first, batch, components, value_dim)
    if blocks > 1:
        grad_z = grad_first.unflatten(0, (batch, mixtures, blocks))[..., plan.CP * plan.BV :].sum(dim=2)
        grad_z = grad_z[..., :components].contiguous()
    return grad_query, grad_key, grad_value, *grad_mixture, *grad_gates, grad_S, grad_z


def laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory layout and dtype of the input that it is the gradient of, as the fake implementation promises."""
    return torch.empty_like(like).copy_(x)


def sum_heads(x: Tensor, like: Tensor | None) -> Tensor:
    """Gradients [B, M, NV, N] of what mixtures share, in the shape and type of the input; of size 0 if unused."""
    if like is None:
        return x.new_empty(0)
    if x.shape[1] * x.shape[2] == like.shape[1]:
        return x.flatten(1, 2).to(like.dtype, copy=True)
    return x.flatten(1, 2).unflatten(1, (like.shape[1], -1)).sum(dim=2).to(like.dtype)


@torch.library.register_fake("gma_hf::fused_attention_backward")
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, output, grad_output,
    grad_normalizer, grad_S, grad_z, causal, strict, normalize, variance_floor, grad_weight, grad_state, *saved,
):  # fmt: skip
    batch, mixtures, components, value_dim = query.shape[0], *means.shape[:2], value.shape[-1]
    last = Saved(*saved).last
    gates = (write_weight if grad_weight else None, log_decay)
    return (
        *(torch.empty_like(row_contiguous(x)) for x in (query, key, value)),
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (means, raw_variances, prior_logits)),
        *(last.new_empty(0) if x is None else x.new_empty(x.shape) for x in gates),
        last.new_empty((batch, mixtures, components, value_dim) if grad_state else 0),
        last.new_empty((batch, mixtures, components) if grad_state else 0),
    )


def setup_context(ctx, inputs, output):
    """Keep inputs, output and what the forward pass saved for the gradients."""
    *tensors, S, z, ctx.causal, ctx.strict, ctx.eps, ctx.variance_floor, _, ctx.final_state, ctx.output_normalizer = (
        inputs
    )
    ctx.state_dtypes = None if S is None else (S.dtype, z.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0], *output[4:])


def backward(ctx, grad_output, grad_normalizer, grad_S, grad_z, *_):
    """Gradients of `fused_attention`'s arguments."""
    tensors = ctx.saved_tensors  # asked for once: activation checkpointing computes them again
    if tensors[-1].numel() == 0:
        raise RuntimeError(
            "The fused kernels kept nothing for a backward pass, as in programs of torch.export. Train the model itself."
        )
    if grad_output is None:
        grad_output = torch.zeros_like(tensors[8])
    if not ctx.final_state:
        grad_S = grad_z = None
    if not ctx.output_normalizer:
        grad_normalizer = None
    needed = ctx.needs_input_grad
    *grads, grad_S, grad_z = torch.ops.gma_hf.fused_attention_backward(
        *tensors[:9], grad_output, grad_normalizer, grad_S, grad_z, ctx.causal, ctx.strict, ctx.eps is not None,
        ctx.variance_floor, needed[6], ctx.state_dtypes is not None, *tensors[9:],
    )  # fmt: skip
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=False)]
    states = (None, None)
    if ctx.state_dtypes is not None:
        states = (grad.to(dtype) for grad, dtype in zip((grad_S, grad_z), ctx.state_dtypes, strict=True))
    return *grads, *states, *(None,) * 7


torch.library.register_autograd("gma_hf::fused_attention", backward, setup_context=setup_context)
