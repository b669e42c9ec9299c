# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The fused kernels as operators that PyTorch knows: what they allocate, how they are launched, how they differentiate.

forward:   coefficients -> responsibilities -> states of chunks -> outputs
backward:  responsibilities again -> states of chunks, of the gradient -> gradients of logits and values
           -> gradients of queries, keys and sums for the mixture -> gradients of the mixture

query [B, HQ, NQ, D], key [B, HK, N, D], value [B, HK, N, DV], mixtures M -> output [B, HQ, NQ, DV], if asked for the
denominators D [B, HQ, NQ] in float32, S [B, M, C, DV], z [B, M, C] float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...operators import differentiate_once, on_one_device, vmapped_by_loops
from .coefficients import coefficients_backward_kernel, coefficients_kernel
from .fused_outputs import fused_read_kernel, write_kernel
from .gradients import gradient_kernel
from .launching import on_its_device
from .outputs import read_kernel
from .plan import PRECISION, Plan, cdiv, make_plan, segment_length, workers_per_mixture
from .responsibilities import logit_gradients_kernel, responsibilities_kernel
from .states import scan_kernel, states_kernel


TILES = 4  # tiles of tokens that a program computes the responsibilities of, with the same coefficients


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass; of size 0 where nothing needs it."""

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


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and token; a head stride of 0 where all heads share one."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def row_contiguous(x: Tensor) -> Tensor:
    """x, copied if the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def plan_of(query: Tensor, value: Tensor, means: Tensor) -> Plan:
    """The plan of a call."""
    mixtures, components, dim = means.shape
    return make_plan(query.dtype, int(components), int(dim), int(value.shape[-1]), int(query.shape[1] // mixtures))


def compute_coefficients(plan: Plan, means, raw_variances, prior_logits, floor: float) -> tuple[Tensor, Tensor]:
    """Run `coefficients_kernel`."""
    mixtures, components, dim = means.shape
    dtype = torch.float32 if plan.exact else torch.bfloat16
    weights = means.new_empty(mixtures, 2 if plan.exact else 4, plan.CP, plan.DP, dtype=dtype)
    bias = means.new_empty(mixtures, plan.CP, dtype=torch.float32)
    coefficients_kernel[(mixtures,)](
        means.contiguous(), raw_variances.contiguous(), prior_logits.contiguous(), weights, bias,
        floor, components, dim, CP=plan.CP, DP=plan.DP, BD=min(plan.BD, 4096 // plan.CP), EXACT=plan.exact,
    )  # fmt: skip
    return weights, bias


def compute_responsibilities(
    plan: Plan, query, key, weights, bias, components: int, gamma_query: Tensor, gamma_key: Tensor, correlate: bool,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """Fill gamma_query [B, HQ, NQ, CP], gamma_key [B, M, NK, CP] and, if given, `lengths` [B, HQ, NQ] and [B, M, NK]."""
    batch, query_heads, query_length, dim = query.shape
    mixtures, key_length = gamma_key.shape[1], gamma_key.shape[2]
    rows = TILES * plan.rows
    query_programs = batch * query_heads * cdiv(query_length, rows)
    responsibilities_kernel[(query_programs + batch * mixtures * cdiv(key_length, rows),)](
        query, key, weights, bias, gamma_query, gamma_key, *lengths,
        *strides(query), *strides(key), *strides(gamma_query), *strides(gamma_key),
        query_length, key_length, components, dim, mixtures, query_programs, mixtures // key.shape[1],
        R=query_heads // mixtures, T=plan.rows, TILES=TILES, CP=plan.CP, DP=plan.DP, BD=plan.BR, EVEN_D=dim == plan.DP,
        CORRELATE=correlate, SAVE=lengths[0] is not None, EXACT=plan.exact, PRECISION=PRECISION, **plan.responsibilities,
    )  # fmt: skip


def scan(states: Tensor, decays: Tensor, first: Tensor | None, last: Tensor, has_decay: bool, reverse: bool) -> None:
    """Run `scan_kernel` in place on states [B * M, segments, size]; fill `last`."""
    slabs, segments, size = states.shape
    block = 128
    scan_kernel[(slabs, cdiv(size, block))](
        states, decays, first, last, segments, size,
        BLOCK=block, ROWS=16, REVERSE=reverse, HAS_DECAY=has_decay, HAS_FIRST=first is not None, num_warps=1,
    )  # fmt: skip


class States(NamedTuple):
    """What `states` leaves."""

    chunks: Tensor | None  # of a causal call, [B * M, chunks, CP, DVP], and their norms and scales
    norms: Tensor | None
    scales: Tensor | None
    largest: Tensor  # [B * heads, NV, chunks], of the values
    decays: Tensor | None  # backwards [B * M, 2, N], running sums of log-decays and resets within the chunks
    last: Tensor | None  # [B * M, CP * DVP + CP], if asked for


def compute_states(
    plan: Plan, gamma, y, output, rd, grad_normalizer, write_weight, log_decay, mixtures, repeats, first,
    reverse: bool, causal: bool, has_z: bool, need_last: bool,
) -> States:  # fmt: skip
    """Run `states_kernel`, in one pass or, where sequences and heads are few, in two with `scan_kernel` between them."""
    batch, heads, length, _ = gamma.shape
    value_dim = y.shape[-1]
    slabs, chunks = batch * mixtures, cdiv(length, plan.T)
    per_segment = segment_length(plan, slabs, chunks, y.device)
    segments = cdiv(chunks, per_segment)

    def new(*shape, dtype=torch.float32):
        return y.new_empty(shape, dtype=dtype)

    largest = new(batch * heads, plan.NV, chunks)
    sums_of_decays = new(slabs, 2, length) if reverse and log_decay is not None else None
    states = norms = scales = None
    if causal:
        states = new(slabs, chunks, plan.CP, plan.DVP, dtype=plan.gamma_dtype)
        norms, scales = new(slabs if has_z else 0, chunks, plan.CP), new(slabs, plan.NV, chunks)
    last = new(slabs, plan.state_size) if need_last or segments > 1 or not causal else None
    blocks = cdiv(plan.CP, plan.BC)

    def launch(first, sums, decays, store_chunks: bool):
        states_kernel[(slabs * plan.NV * blocks * segments,)](
            gamma, y, output, rd, grad_normalizer, write_weight, log_decay, first, sums, decays, states, norms, scales, largest,
            sums_of_decays, *strides(gamma), *strides(y), *strides(output), *strides(write_weight), *strides(log_decay),
            length, value_dim, mixtures, segments, per_segment, mixtures // y.shape[1] if not reverse else 1,
            R=repeats, T=plan.T, CP=plan.CP, BC=plan.BC, BV=plan.BV, NV=plan.NV, EVEN_V=value_dim == plan.DVP,
            REVERSE=reverse, CHUNKS=store_chunks, HAS_FIRST=first is not None, LAST=sums is not None,
            HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None, HAS_Z=has_z, NORMALIZE=rd is not None,
            HAS_GRAD_NORMALIZER=grad_normalizer is not None, EXACT=plan.exact, PRECISION=PRECISION, **plan.states,
        )  # fmt: skip

    if causal and segments == 1:
        launch(first, last, None, True)
    else:
        sums, decays = new(slabs, segments, plan.state_size), new(slabs, segments)
        launch(None, sums, decays, False)
        scan(sums, decays, first, last, log_decay is not None, reverse)
        if causal:
            launch(sums, None, None, True)
    return States(states, norms, scales, largest, sums_of_decays, last)


def to_slabs(plan: Plan, S: Tensor, z: Tensor) -> Tensor:
    """S [B, M, C, DV], z [B, M, C] -> [B * M, CP * DVP + CP]."""
    batch, mixtures, components, value_dim = S.shape
    slabs = S.new_zeros(batch, mixtures, plan.state_size, dtype=torch.float32)
    norms = plan.CP * plan.DVP
    slabs[..., :norms].unflatten(-1, (plan.CP, plan.DVP))[..., :components, :value_dim] = S
    slabs[..., norms:][..., :components] = z
    return slabs.flatten(0, 1)


def from_slabs(plan: Plan, slabs: Tensor, batch: int, components: int, dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of `to_slabs`: always a copy, so that nobody holds on to the padding."""
    slabs, norms = slabs.unflatten(0, (batch, -1)), plan.CP * plan.DVP
    S = slabs[..., :norms].unflatten(-1, (plan.CP, plan.DVP))[..., :components, :dim]
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (S, slabs[..., norms:][..., :components]))


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


def read_from_memory(
    plan, query, key, value, weights, bias, write_weight, log_decay, components, first, output, normalizer, rd,
    causal, strict, eps, save, final_state, correlate,
) -> States:  # fmt: skip
    """Fill output, normalizer and rd, with the responsibilities in memory."""
    batch, query_heads, length, _ = query.shape
    mixtures, normalize = weights.shape[0], eps is not None
    gamma_query = query.new_empty(batch, query_heads, length, plan.CP, dtype=plan.gamma_dtype)
    gamma_key = query.new_empty(batch, mixtures, key.shape[2], plan.CP, dtype=plan.gamma_dtype)
    compute_responsibilities(plan, query, key, weights, bias, components, gamma_query, gamma_key, correlate)
    states = compute_states(
        plan, gamma_key, value, None, None, None, write_weight, log_decay, mixtures, 1, first,
        False, causal, normalize or final_state, final_state,
    )  # fmt: skip
    read_kernel[(batch * mixtures * cdiv(length, plan.T),)](
        gamma_query, gamma_key, value, output, normalizer, rd, write_weight, log_decay,
        states.chunks if causal else states.last, states.norms, states.scales, states.largest,
        *strides(gamma_query), *strides(gamma_key), *strides(value), *strides(output), *strides(write_weight),
        *strides(log_decay), length, value.shape[-1], mixtures, mixtures // key.shape[1], eps or 0.0,
        R=query_heads // mixtures, T=plan.T, CP=plan.CP, BV=plan.BV, NV=plan.NV, EVEN_V=value.shape[-1] == plan.DVP,
        CAUSAL=causal, STRICT=strict, HAS_WEIGHT=write_weight is not None, HAS_DECAY=log_decay is not None,
        NORMALIZE=normalize, OUTPUT_NORMALIZER=normalizer is not None, SAVE=save, EXACT=plan.exact, PRECISION=PRECISION,
        **plan.read,
    )  # fmt: skip
    return states


def read_fused(
    plan, query, key, value, weights, bias, write_weight, log_decay, components, first, output, normalizer, rd,
    causal, strict, eps, save, final_state, correlate,
) -> States:  # fmt: skip
    """Fill output, normalizer and rd, with responsibilities that stay on the chip."""
    batch, query_heads, length, dim = query.shape
    mixtures, normalize, value_dim, key_length = weights.shape[0], eps is not None, value.shape[-1], key.shape[2]
    slabs, chunks, key_chunks = batch * mixtures, cdiv(length, plan.T), cdiv(key_length, plan.T)
    has_z = normalize or final_state
    new = bias.new_empty
    one_pass = causal and segment_length(plan, slabs, chunks, query.device) == chunks
    last = new(slabs, plan.state_size) if final_state or not one_pass else None
    largest = new(slabs, 1, key_chunks) if save or not one_pass else None
    kept = norms = scales = None
    if save and causal:
        kept = new(slabs, chunks, plan.CP, plan.BV, dtype=plan.gamma_dtype)
        norms, scales = new(slabs if has_z else 0, chunks, plan.CP), new(slabs, 1, chunks)
    constants = {
        "T": plan.T, "CP": plan.CP, "DP": plan.DP, "BD": plan.BD, "BV": plan.BV, "EVEN_D": dim == plan.DP,
        "EVEN_V": value_dim == plan.BV, "HAS_WEIGHT": write_weight is not None, "HAS_DECAY": log_decay is not None,
        "HAS_Z": has_z, "CORRELATE": correlate, "EXACT": plan.exact, "PRECISION": PRECISION, **plan.fused_launch,
    }  # fmt: skip
    states, per_segment = first, chunks
    if not one_pass:
        per_key_segment = segment_length(plan, slabs, key_chunks, query.device)
        segments = cdiv(key_chunks, per_key_segment)
        states, decays = new(slabs, segments, plan.state_size), new(slabs, segments)
        write_kernel[(slabs * segments,)](
            key, value, write_weight, log_decay, weights, bias, states, decays, largest,
            *strides(key), *strides(value), *strides(write_weight), *strides(log_decay),
            key_length, components, dim, value_dim, mixtures, segments, per_key_segment, mixtures // key.shape[1], **constants,
        )  # fmt: skip
        scan(states, decays, first, last, log_decay is not None, False)
        per_segment = per_key_segment if causal else segment_length(plan, slabs, chunks, query.device)
        states = states if causal else last
    segments = cdiv(chunks, per_segment)
    fused_read_kernel[(slabs * segments,)](
        query, key, value, output, normalizer, rd, write_weight, log_decay, weights, bias, states, last,
        largest, kept, norms, scales,
        *strides(query), *strides(key), *strides(value), *strides(output), *strides(write_weight), *strides(log_decay),
        0 if states is None else states.stride(0), length, components, dim, value_dim, mixtures, segments, per_segment,
        mixtures // key.shape[1], eps or 0.0,
        R=query_heads // mixtures, CAUSAL=causal, ONE_PASS=one_pass, LAST=one_pass and final_state,
        HAS_STATE=states is not None, STRICT=strict, NORMALIZE=normalize,
        OUTPUT_NORMALIZER=normalizer is not None, SAVE=save, **constants,
    )  # fmt: skip
    return States(kept, norms, scales, largest, None, last)


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
    """Memory for responsibilities [B, heads, N, CP], which the gradients of the logits replace: that of `grad`, the gradient
    of queries or keys, where both have the same size. It is read and written tile by tile."""
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
    """Gradients of the inputs in their order, S and z included; of size 0 where nothing needs them."""
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
    """x in the memory layout and dtype of the input that it is the gradient of, as the fake implementation promises."""
    return torch.empty_like(like).copy_(x)


def sum_heads(x: Tensor, like: Tensor | None) -> Tensor:
    """Gradients [B, M, N] of what mixtures share, in the shape and type of the input; of size 0 if unused."""
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
    vmapped_by_loops(getattr(torch.ops.gma_hf, name), f"gma_hf::{name}")


class FusedAttention(torch.autograd.Function):
    """The operator with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
        variance_floor, save, final_state, output_normalizer, correlate,
    ):  # fmt: skip
        """Output, D, S, z, and what the backward pass needs."""
        return torch.ops.gma_hf.fused_attention(
            query, key, value, means, raw_variances, prior_logits, write_weight, log_decay, S, z, causal, strict, eps,
            variance_floor, save, final_state, output_normalizer, correlate,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep inputs, output and what the forward pass saved for the gradients."""
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
