# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The fused kernels as registered operators of PyTorch: their memory, their passes, their derivatives.

forward:   coefficients -> responsibilities -> states of chunks -> outputs
backward:  responsibilities again -> states of chunks, of the gradient -> gradients of logits and values
           -> gradients of queries, keys and sums for the mixture -> gradients of the mixture

query [B, HQ, NQ, D], key [B, HK, N, D], value [B, HK, N, DV], mixtures M -> output [B, HQ, NQ, DV], if requested the
denominators D [B, HQ, NQ] in float32, S [B, M, C, DV], z [B, M, C] float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...operators import differentiate_once, on_one_device, vmapped_by_loops
from .coefficients import coefficients_backward_kernel
from .gradients import gradient_kernel
from .launching import empty_output, on_its_device, row_contiguous, strides
from .passes import (
    compute_coefficients,
    compute_responsibilities,
    compute_states,
    from_slabs,
    plan_of,
    read_from_memory,
    read_fused,
    to_slabs,
)
from .plan import PRECISION, Plan, cdiv, workers_per_mixture
from .responsibilities import logit_gradients_kernel


class Saved(NamedTuple):
    """The tensors that the forward pass keeps for the backward pass; of size 0 if nothing needs them."""

    rd: Tensor  # [B, HQ, NQ], 1 / D
    states: (
        Tensor  # [B * M, chunks, CP, DVP], S before every chunk times its scale; bidirectional: [B * M, CP * DVP + CP]
    )
    norms: Tensor  # [B * M, chunks, CP], z
    scales: Tensor  # [B * M, NV, chunks]
    largest_value: Tensor  # [B * M, NV, chunks of keys]
    weights: Tensor  # the mixture in the layout of `coefficients`
    bias: Tensor


def saved_shapes(plan: Plan, query, key, means, causal, normalize, has_z) -> dict[str, tuple]:
    """The shapes of `Saved`."""
    batch, heads, length, _ = query.shape
    mixtures = means.shape[0]
    slabs, chunks = batch * mixtures, cdiv(length, plan.T) if causal else 0
    return {
        "rd": (batch if normalize else 0, heads, length),
        "states": (slabs, chunks, plan.CP, plan.DVP) if causal else (slabs, plan.state_size),
        "norms": (slabs if causal and has_z else 0, chunks, plan.CP),
        "scales": (slabs if causal else 0, plan.NV, chunks),
        "largest_value": (slabs, plan.NV, cdiv(key.shape[2], plan.T)),
        "weights": (mixtures, 2 if plan.exact else 4, plan.CP, plan.DP),
        "bias": (mixtures, plan.CP),
    }


def saved_dtype(plan: Plan, name: str, causal: bool) -> torch.dtype:
    """The dtype of a tensor of `Saved`."""
    if name == "states" and causal:
        return plan.gamma_dtype
    return torch.bfloat16 if name == "weights" and not plan.exact else torch.float32


INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor means, Tensor raw_variances, Tensor prior_logits, "
    "Tensor? write_weight, Tensor? log_decay"
)


# Defined and implemented in two steps: the decorator that does both adds 0.1 ms to every call
torch.library.define(
    "gma_hf::fused_attention",
    f"({INPUTS}, Tensor? S, Tensor? z, bool causal, bool strict, float? eps, float variance_floor, bool save, "
    f"bool final_state, bool output_normalizer, bool correlate) -> ({', '.join(['Tensor'] * (4 + len(Saved._fields)))})",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::fused_attention", ("cpu", "cuda"))
@on_one_device
@on_its_device
def fused_attention(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
    variance_floor, save, final_state, output_normalizer, correlate,
):  # fmt: skip
    """Output, D (of size 0 unless output_normalizer), S, z (unless final_state) and `Saved` (unless save)."""
    batch, query_heads, length, _ = query.shape
    components, value_dim, normalize = means.shape[1], value.shape[-1], eps is not None
    query, key, value = row_contiguous(query), row_contiguous(key), row_contiguous(value)
    plan = plan_of(query, value, means)
    weights, bias = compute_coefficients(plan, means, raw_variances, prior_logits, variance_floor)
    output, normalizer = empty_output(query, value), empty_normalizer(query, output_normalizer)
    rd = bias.new_empty(batch if save and normalize else 0, query_heads, length)
    states = (read_fused if plan.fused else read_from_memory)(
        plan, query, key, value, weights, bias, write_weight, log_decay, components,
        None if S is None else to_slabs(plan, S, z), output, normalizer if output_normalizer else None, rd,
        causal, strict, eps, save, final_state, correlate,
    )  # fmt: skip
    if final_state:
        S, z = from_slabs(plan, states.last, batch, components, value_dim)
    else:
        S, z = bias.new_empty(0), bias.new_empty(0)
    if not save:
        return output, normalizer, S, z, *nothing_saved(bias)
    norms, scales = (
        (states.norms, states.scales) if causal else (bias.new_empty(0, 0, plan.CP), bias.new_empty(0, plan.NV, 0))
    )
    saved = Saved(rd, states.chunks if causal else states.last, norms, scales, states.largest, weights, bias)
    return output, normalizer, S, z, *saved


def nothing_saved(like: Tensor) -> Saved:
    """
    The result of an inference. Shapes that depend on the number of chunks would prevent symbolic lengths in torch.export.
    """
    return Saved(*(like.new_empty(0) for _ in Saved._fields))


def empty_normalizer(query: Tensor, output_normalizer: bool) -> Tensor:
    """[B, HQ, NQ] if it is requested, otherwise of size 0."""
    return query.new_empty(query.shape[:3] if output_normalizer else 0, dtype=torch.float32)


@torch.library.register_fake("gma_hf::fused_attention")
@on_one_device
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
    variance_floor, save, final_state, output_normalizer, correlate,
):  # fmt: skip
    (mixtures, components, _), value_dim = means.shape, value.shape[-1]
    plan = plan_of(query, value, means)
    single = query.new_empty(0, dtype=torch.float32)
    saved = nothing_saved(single)
    if save:
        normalize = eps is not None
        shapes = saved_shapes(plan, query, key, means, causal, normalize, normalize or final_state)
        saved = [query.new_empty(size, dtype=saved_dtype(plan, name, causal)) for name, size in shapes.items()]
    shape = (query.shape[0], mixtures, components)
    S, z = (single.new_empty(size if final_state else 0) for size in ((*shape, value_dim), shape))
    return empty_output(query, value), empty_normalizer(query, output_normalizer), S, z, *saved


torch.library.define(
    "gma_hf::fused_attention_backward",
    f"({INPUTS}, Tensor output, Tensor grad_output, Tensor? grad_normalizer, Tensor? grad_S, Tensor? grad_z, bool causal, "
    "bool strict, bool normalize, float variance_floor, bool grad_weight, bool grad_state, bool correlate, "
    f"{', '.join(f'Tensor {name}' for name in Saved._fields)}) "
    f"-> ({', '.join(['Tensor'] * 10)})",
    tags=torch.Tag.pt2_compliant_tag,
)


def responsibilities_like(plan: Plan, grad: Tensor, heads: int) -> Tensor:
    """
    Memory for responsibilities [B, heads, N, CP], which the gradients of the logits replace. It is the memory of `grad`, the
    gradient of queries or keys, if both have the same size. It is read and written tile by tile.
    """
    batch, _, length, dim = grad.shape
    same_size = dim == plan.CP == plan.BD and grad.shape[1] == heads
    if same_size and grad.element_size() == plan.gamma_dtype.itemsize and grad.stride(-1) == 1:
        return grad.view(plan.gamma_dtype)
    return grad.new_empty(batch, heads, length, plan.CP, dtype=plan.gamma_dtype)


@torch.library.impl("gma_hf::fused_attention_backward", ("cpu", "cuda"))
@on_one_device
@on_its_device
def fused_attention_backward(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, output, grad_output,
    grad_normalizer, grad_S, grad_z, causal, strict, normalize, variance_floor, grad_weight, grad_state, correlate, *saved,
):  # fmt: skip
    """Gradients of the inputs in their order, S and z included; of size 0 if nothing needs them."""
    batch, query_heads, length, dim = query.shape
    mixtures, components, _ = means.shape
    value_dim, repeats, key_heads, key_length = value.shape[-1], query_heads // mixtures, key.shape[1], key.shape[2]
    query, key, value, grad_output = (row_contiguous(x) for x in (query, key, value, grad_output))
    plan, saved = plan_of(query, value, means), Saved(*saved)
    new = saved.bias.new_empty
    shared = mixtures != key_heads  # mixtures that share keys and values: their gradients are added up below
    grad_query = torch.empty_like(query)
    grad_key = new(batch, mixtures, key_length, dim) if shared else torch.empty_like(key)
    grad_value = new(batch, mixtures, key_length, value_dim) if shared else torch.empty_like(value)
    gamma_query = responsibilities_like(plan, grad_query, query_heads)
    gamma_key = responsibilities_like(plan, grad_key, mixtures)
    lengths = (None, None)
    if correlate:
        lengths = new(batch, query_heads, length), new(batch, mixtures, key_length)
    compute_responsibilities(
        plan, query, key, saved.weights, saved.bias, components, gamma_query, gamma_key, correlate, lengths
    )

    rd = saved.rd if normalize else None
    grad_normalizer = None if grad_normalizer is None else grad_normalizer.contiguous()
    first = None
    if grad_S is not None or grad_z is not None:
        shape = (batch, mixtures, components)
        grad_S = new(*shape, value_dim).zero_() if grad_S is None else grad_S
        first = to_slabs(plan, grad_S, new(shape).zero_() if grad_z is None else grad_z)
    has_z = normalize or first is not None
    states = compute_states(
        plan, gamma_query, grad_output, output if normalize else None, rd, grad_normalizer, None, log_decay,
        mixtures, repeats, first, True, causal, has_z, grad_state,
    )  # fmt: skip

    grad_gates = new(2, batch, mixtures, key_length)
    logits_dtype = torch.float32 if plan.exact else torch.bfloat16
    grad_logits = [x.view(logits_dtype) for x in (gamma_query, gamma_key)]
    sides = ((True, True, length),) if causal else ((True, False, length), (False, True, key_length))
    for queries, keys, tokens in sides:
        gradient_kernel[(batch * mixtures * cdiv(tokens, plan.T),)](
            gamma_query, gamma_key, value, grad_output, rd, grad_normalizer, write_weight, log_decay, states.decays, *lengths,
            saved.states, saved.norms, saved.scales, states.chunks if causal else states.last, states.norms, states.scales,
            saved.largest_value, states.largest, *grad_logits, grad_value, *grad_gates,
            *strides(gamma_query), *strides(gamma_key), *strides(value), *strides(grad_output), *strides(grad_value),
            *strides(write_weight), *strides(log_decay), tokens, components, value_dim, mixtures, mixtures // key_heads,
            R=repeats, T=plan.T, CP=plan.CP, BV=plan.BV, NV=plan.NV, EVEN_V=value_dim == plan.DVP,
            CAUSAL=causal, QUERIES=queries, KEYS=keys, STRICT=strict, CORRELATE=correlate,
            HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None, HAS_Z=has_z, NORMALIZE=normalize,
            HAS_GRAD_NORMALIZER=grad_normalizer is not None, GRAD_WEIGHT=grad_weight,
            EXACT=plan.exact, PRECISION=PRECISION, **plan.gradient,
        )  # fmt: skip

    tiles = batch * cdiv(max(length * repeats, key_length), plan.T)
    workers = workers_per_mixture(plan, mixtures, tiles, query.device)
    grad_linear, grad_quadratic = new(2, 2 * workers, mixtures, plan.CP, plan.DP)
    grad_bias = new(2 * workers, mixtures, plan.CP)
    logit_gradients_kernel[(2 * workers * mixtures * (plan.DP // plan.BD),)](
        query, key, *grad_logits, saved.weights, grad_query, grad_key, grad_linear, grad_quadratic, grad_bias,
        *strides(query), *strides(key), *strides(gamma_query), *strides(gamma_key), *strides(grad_query), *strides(grad_key),
        batch, length, key_length, dim, mixtures, workers, mixtures // key_heads,
        R=repeats, T=plan.T, CP=plan.CP, DP=plan.DP, BD=plan.BD, EVEN_D=dim == plan.DP,
        EXACT=plan.exact, PRECISION=PRECISION, **plan.logits,
    )  # fmt: skip
    grad_mixture = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (means, raw_variances, prior_logits)
    )
    columns = min(16, plan.DP)
    coefficients_backward_kernel[(mixtures, plan.DP // columns)](
        means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(),
        grad_linear, grad_quadratic, grad_bias, *grad_mixture,
        variance_floor, components, dim, 2 * workers, mixtures, CP=plan.CP, DP=plan.DP, BD=columns,
    )  # fmt: skip

    if shared:
        grad_key, grad_value = (
            laid_out_as(like, grad.unflatten(1, (key_heads, -1)).sum(dim=2))
            for like, grad in ((key, grad_key), (value, grad_value))
        )
    gates = (write_weight if grad_weight else None, log_decay)
    grad_gates = (sum_heads(grad, gate) for grad, gate in zip(grad_gates, gates, strict=True))
    grad_S, grad_z = new(0), new(0)
    if grad_state:
        grad_S, grad_z = from_slabs(plan, states.last, batch, components, value_dim)
    return grad_query, grad_key, grad_value, *grad_mixture, *grad_gates, grad_S, grad_z


def laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory layout and dtype of the input of this gradient, as the fake implementation promises."""
    return torch.empty_like(like).copy_(x)


def sum_heads(x: Tensor, like: Tensor | None) -> Tensor:
    """Gradients [B, M, N] of an input that mixtures share, in its shape and dtype; of size 0 if unused."""
    if like is None:
        return x.new_empty(0)
    if x.shape[1] == like.shape[1]:
        return x.to(like.dtype, copy=True)
    return x.unflatten(1, (like.shape[1], -1)).sum(dim=2).to(like.dtype)


@torch.library.register_fake("gma_hf::fused_attention_backward")
@on_one_device
def _(
    query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, output, grad_output,
    grad_normalizer, grad_S, grad_z, causal, strict, normalize, variance_floor, grad_weight, grad_state, correlate, *saved,
):  # fmt: skip
    batch, mixtures, components, value_dim = query.shape[0], *means.shape[:2], value.shape[-1]
    bias = Saved(*saved).bias
    gates = (write_weight if grad_weight else None, log_decay)
    return (
        *(torch.empty_like(row_contiguous(x)) for x in (query, key, value)),
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (means, raw_variances, prior_logits)),
        *(bias.new_empty(0) if x is None else x.new_empty(x.shape) for x in gates),
        bias.new_empty((batch, mixtures, components, value_dim) if grad_state else 0),
        bias.new_empty((batch, mixtures, components) if grad_state else 0),
    )


for name in ("fused_attention", "fused_attention_backward"):
    vmapped_by_loops(name)


class FusedAttention(torch.autograd.Function):
    """The operator with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
        variance_floor, save, final_state, output_normalizer, correlate,
    ):  # fmt: skip
        """Output, D, S, z, and the tensors for the backward pass."""
        return torch.ops.gma_hf.fused_attention(
            query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
            variance_floor, save, final_state, output_normalizer, correlate,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep inputs, output and the saved tensors of the forward pass for the gradients."""
        (
            *tensors, S, z, causal, strict, eps, variance_floor, _, ctx.final_state, ctx.output_normalizer, ctx.correlate,
        ) = inputs  # fmt: skip
        ctx.options = causal, strict, eps is not None, variance_floor
        ctx.state_dtypes = None if S is None else (S.dtype, z.dtype)
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0], *output[4:])

    @staticmethod
    def backward(ctx, grad_output, grad_normalizer, grad_S, grad_z, *_):
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
        *grads, grad_S, grad_z = differentiate_once(
            torch.ops.gma_hf.fused_attention_backward,
            *tensors[:9], grad_output, grad_normalizer, grad_S, grad_z, *ctx.options, needed[6],
            ctx.state_dtypes is not None, ctx.correlate, *tensors[9:],
        )  # fmt: skip
        grads = [grad if need else None for grad, need in zip(grads, needed, strict=False)]
        states = (None, None)
        if ctx.state_dtypes is not None:
            states = (grad.to(dtype) for grad, dtype in zip((grad_S, grad_z), ctx.state_dtypes, strict=True))
        return *grads, *states, *(None,) * 8
