# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Causal attention in chunks, forward and backward, as operators that PyTorch knows. The equations are in `causal`.

query [B, Hq, N, d], key [B, Hk, N, d], value [B, Hk, N, dv], S [M, B, C, dv], z [M, B, C] -> output [B, Hq, N, dv], D [B, Hq, N],
S and z after the last token.
"""

import torch

from ...operators import differentiate_once, on_one_device, vmapped_by_loops
from ..mixture import MixtureCoefficients
from .blocks import causal_blocks, contiguous_clone, empty_reads, state_slots
from .causal import block_backward, block_read, block_terms


# The two passes are opaque operators to torch.compile and torch.export: lengths stay dynamic, and a model of many
# layers is not traced block by block.


@torch.library.custom_op(
    "gma_hf::chunked_causal",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor[] coefficients, Tensor? write_weight, Tensor? log_decay, "
    "Tensor S, Tensor z, float? eps, bool strict, bool output_normalizer, bool correlate) -> (Tensor, Tensor, Tensor, Tensor)",
)
@on_one_device
def causal_forward(
    query, key, value, coefficients, write_weight, log_decay, S, z, eps, strict, output_normalizer, correlate
):
    """Output, D (of size 0 unless `output_normalizer`), and S and z before every block and, in what slots remain, after the
    last: [slots, M, B, ...]."""
    coefficients = MixtureCoefficients(*coefficients)
    output, normalizer = empty_reads(query, S, value.dtype, output_normalizer)
    cover = causal_blocks(query.shape[2])
    slots = state_slots(query.shape[2])
    block_S, block_z = S.new_empty(slots, *S.shape), z.new_empty(slots, *z.shape)
    block_S[0], block_z[0] = S, z
    for i, block in enumerate(cover):
        S, z = block_S[i], block_z[i]
        terms = block_terms(block, query, key, value, coefficients, write_weight, log_decay, S, z, strict, correlate)
        read, total = block_read(terms, eps)
        block.put_queries(output, read)
        if output_normalizer:
            block.put_queries(normalizer.unsqueeze(-1), total)
        block_S[i + 1], block_z[i + 1] = terms.last_S, terms.last_z
        del terms, read, total  # so that the next block finds its memory, still in the cache
    block_S[len(cover) :], block_z[len(cover) :] = block_S[len(cover)].clone(), block_z[len(cover)].clone()
    return output, normalizer, block_S, block_z


vmapped_by_loops("chunked_causal")


@causal_forward.register_fake
@on_one_device
def _(query, key, value, coefficients, write_weight, log_decay, S, z, eps, strict, output_normalizer, correlate):
    slots = state_slots(query.shape[2])
    reads = empty_reads(query, S, value.dtype, output_normalizer)
    return *reads, S.new_empty(slots, *S.shape), z.new_empty(slots, *z.shape)


@torch.library.custom_op(
    "gma_hf::chunked_causal_backward",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor[] coefficients, Tensor? write_weight, Tensor? log_decay, "
    "Tensor block_S, Tensor block_z, Tensor grad_output, Tensor? grad_normalizer, Tensor grad_S, Tensor grad_z, "
    "float? eps, bool strict, bool correlate) -> Tensor[]",
)
@on_one_device
def causal_backward(
    query, key, value, coefficients, write_weight, log_decay, block_S, block_z, grad_output, grad_normalizer, grad_S, grad_z,
    eps, strict, correlate,
):  # fmt: skip
    """Gradients of query, key, value, S, z, linear, quadratic, bias and, where given, write_weight and log_decay."""
    coefficients = MixtureCoefficients(*coefficients)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    grad_coefficients = [torch.zeros_like(x) for x in coefficients[1:]]
    grad_weight = None if write_weight is None else torch.empty_like(write_weight)
    grad_decay = None if log_decay is None else torch.empty_like(log_decay)
    grad_S, grad_z = contiguous_clone(grad_S), contiguous_clone(grad_z)
    with torch.autocast(device_type=query.device.type, enabled=False):
        for i, block in reversed(list(enumerate(causal_blocks(query.shape[2])))):
            S, z = block_S[i], block_z[i]
            terms = block_terms(
                block, query, key, value, coefficients, write_weight, log_decay, S, z, strict, correlate
            )
            grad_read = block.of_queries(grad_output, S.shape[0]).to(S.dtype).flatten(3, 4)
            grad_total = None
            if grad_normalizer is not None:
                grad_total = block.of_queries(grad_normalizer.unsqueeze(-1), S.shape[0]).flatten(3, 4)
            gradient = block_backward(terms, grad_read, grad_total, grad_S, grad_z, eps)
            block.put_queries(grads[0], gradient.query)
            block.put_keys(grads[1], gradient.key)
            block.put_keys(grads[2], gradient.value)
            for total, part in zip(grad_coefficients, gradient.coefficients, strict=True):
                total.add_(part)
            if grad_weight is not None:
                block.put_keys(grad_weight, gradient.write_weight)
            if grad_decay is not None:
                block.put_keys(grad_decay, gradient.log_decay)
            grad_S, grad_z = gradient.S, gradient.z
            del terms, grad_read, grad_total, gradient
    optional = [grad for grad in (grad_weight, grad_decay) if grad is not None]
    return [*grads, grad_S, grad_z, *grad_coefficients, *optional]


vmapped_by_loops("chunked_causal_backward")


@causal_backward.register_fake
@on_one_device
def _(
    query, key, value, coefficients, write_weight, log_decay, block_S, block_z, grad_output, grad_normalizer, grad_S, grad_z,
    eps, strict, correlate,
):  # fmt: skip
    optional = [x for x in (write_weight, log_decay) if x is not None]
    states = grad_S.new_empty(grad_S.shape), grad_z.new_empty(grad_z.shape)
    gradients = [torch.empty_like(x) for x in (query, key, value, *coefficients[1:], *optional)]
    return [*gradients[:3], *states, *gradients[3:]]


def causal_gradients(query, key, value, centre, linear, quadratic, bias, *arguments):
    """`causal_backward` of single tensors."""
    return causal_backward(query, key, value, [centre, linear, quadratic, bias], *arguments)


class CausalChunks(torch.autograd.Function):
    """Causal attention on query, key, value [B, heads, N, dim] and a state S [M, B, C, dv], z [M, B, C]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, value, centre, linear, quadratic, bias, write_weight, log_decay, S, z, eps, strict,
        output_normalizer, correlate,
    ):  # fmt: skip
        """Output, D, S and z after the last token, and the states before every block, which the backward pass needs."""
        coefficients = [centre, linear, quadratic, bias]
        output, normalizer, block_S, block_z = causal_forward(
            query, key, value, coefficients, write_weight, log_decay, S, z, eps, strict, output_normalizer, correlate
        )
        return output, normalizer, block_S[-1].clone(), block_z[-1].clone(), block_S, block_z

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, eps, strict, output_normalizer, correlate = inputs
        block_S, block_z = output[4:]
        ctx.mark_non_differentiable(block_S, block_z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, block_S, block_z)
        ctx.options = eps, strict, correlate
        ctx.output_normalizer = output_normalizer

    @staticmethod
    def backward(ctx, grad_output, grad_normalizer, grad_S, grad_z, *_):
        query, key, value, *coefficients, write_weight, log_decay, block_S, block_z = ctx.saved_tensors
        if grad_output is None:
            grad_output = query.new_zeros(*query.shape[:3], value.shape[3], dtype=value.dtype)
        grads = differentiate_once(
            causal_gradients, query, key, value, *coefficients, write_weight, log_decay, block_S, block_z, grad_output,
            grad_normalizer if ctx.output_normalizer else None,
            torch.zeros_like(block_S[-1]) if grad_S is None else grad_S,
            torch.zeros_like(block_z[-1]) if grad_z is None else grad_z,
            *ctx.options,
        )  # fmt: skip
        optional = list(grads[8:])
        grad_weight = None if write_weight is None else optional.pop(0)
        grad_decay = None if log_decay is None else optional.pop(0)
        return *grads[:3], None, *grads[5:8], grad_weight, grad_decay, *grads[3:5], None, None, None, None
