# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Causal attention in chunks, forward and backward: the arithmetic of a block of chunks. `causal_operators` walks over the blocks.

Positions i, j are in chunk n of T tokens; S_n, z_n is the state before the chunk, A_n the decay over all of it:

    P_ij    = gamma^Q_i . w_j gamma^K_j  exp(sum_{j < l <= i} log a_l)                         j <= i
    o_i     = (sum_j P_ij v_j + e_i gamma^Q_i S_n) / D_i,       D_i = sum_j P_ij + e_i gamma^Q_i z_n + eps
    S_{n+1} = A_n S_n + sum_j t_j w_j gamma^K_j v_j^T,      z_{n+1} likewise with v_j = 1

with e and t the decays from the chunk's start and to its end. Backwards, with n_i = o_i D_i and G_n the gradient of the
state after chunk n (the states' recurrence, run from right to left):

    dn_i     = do_i / D_i                                  dD_i = -(dn_i . n_i) / D_i   (+ that of D_i as an output)
    dP_ij    = dn_i . v_j + dD_i                           dr_i = e_i (S_n dn_i + z_n dD_i)
    dgamma^Q = decayed dP @ (w gamma^K) + dr               d(w gamma^K) = (decayed dP)^T @ gamma^Q + t (v G_n^T + g_n)
    dv       = P^T dn + t w gamma^K G_n

With correlation, rho stands for gamma. Only the inputs and one state per block are kept; responsibilities and pair weights
are computed again. Shapes as in `blocks`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..mixture import MixtureCoefficients, Route, route, route_backward
from .blocks import Block, add_product_
from .decay import Decays, block_decays, forget, log_decay_gradient


class BlockTerms(NamedTuple):
    """The values that the forward and the backward pass of a block share."""

    coefficients: MixtureCoefficients
    query: Tensor  # [M, B, n, R * T, d], centred
    key: Tensor  # [M, B, n, T, d], centred
    value: Tensor  # [M, B, n, T, dv]
    read: Route  # [M, B, n, R * T, C], gamma^Q
    write: Route  # [M, B, n, T, C], gamma^K
    write_weight: Tensor | None  # [h, B, n, T, 1]
    written: Tensor  # [M, B, n, T, C], w_j gamma^K_j
    kept: Tensor  # [M, B, n, T, C], t_j w_j gamma^K_j
    pairs: Tensor  # [M, B, n, R * T, T], P
    decays: Decays | None
    chunk_decays: Tensor  # [h, B, n + 1, n + 1], from the block's first state and the chunks' writes to all states
    S: Tensor  # [M, B, n, C, dv], before every chunk
    z: Tensor  # [M, B, n, C]
    last_S: Tensor  # [M, B, C, dv], after the block
    last_z: Tensor  # [M, B, C]


def block_terms(
    block: Block,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: MixtureCoefficients,
    write_weight: Tensor | None,
    log_decay: Tensor | None,
    S: Tensor,
    z: Tensor,
    strict: bool,
    correlate: bool,
) -> BlockTerms:
    """Responsibilities, pair weights and states of a block, from the state S [M, B, C, dv], z [M, B, C] before it."""
    mixtures, dtype = S.shape[0], S.dtype
    write_weight = None if write_weight is None else block.of(write_weight).to(dtype)
    query = block.centred_queries(query, coefficients.centre)
    key = block.centred_keys(key, coefficients.centre, write_weight)
    value = block.of_keys(value, mixtures, write_weight).to(dtype).contiguous()
    read, write = route(query, coefficients, correlate), route(key, coefficients, correlate)

    written = write.weights
    if write_weight is not None:
        write_weight = write_weight.unsqueeze(-1)
        written = written * write_weight
    pairs = read.weights @ written.transpose(-1, -2)
    chunks, repeats = value.shape[2], query.shape[3] // block.chunk
    if log_decay is None:
        decays, kept = None, written
        lower_triangle_(pairs, block.chunk)
        chunk_decays = S.new_ones(1, 1, chunks + 1, chunks + 1).tril_()
    else:
        decays = block_decays(block.of(log_decay).to(dtype), strict, repeats)
        kept = written * decays.to_end
        pairs = forget(pairs, decays, signed=correlate)
        chunk_decays = decays.chunks

    # S_{n+1} = A_n S_n + writes_n, unrolled over the block's chunks into one matrix product.
    writes, weights = (kept.transpose(-1, -2) @ value).flatten(3), kept.sum(dim=-2)
    before, after = chunk_decays[..., :-1, :], chunk_decays[..., -1:, :]
    return BlockTerms(
        coefficients,
        query,
        key,
        value,
        read,
        write,
        write_weight,
        written,
        kept,
        pairs,
        decays,
        chunk_decays,
        S=propagate(before, writes, S.flatten(2)).unflatten(-1, S.shape[2:]),
        z=propagate(before, weights, z),
        last_S=propagate(after, writes, S.flatten(2)).view_as(S),
        last_z=propagate(after, weights, z).view_as(z),
    )


def propagate(decays: Tensor, writes: Tensor, first: Tensor) -> Tensor:
    """decays @ [first, writes]: decays [h, B, m, n + 1], writes [M, B, n, dim], first [M, B, dim] -> [M, B, m, dim]."""
    return (decays[..., 1:] @ writes).addcmul_(decays[..., :1], first.unsqueeze(2))


def propagate_back(decays: Tensor, reads: Tensor, last: Tensor) -> Tensor:
    """decays @ [reads, last]: decays [h, B, m, n + 1], reads [M, B, n, dim], last [M, B, dim] -> [M, B, m, dim]."""
    return (decays[..., :-1] @ reads).addcmul_(decays[..., -1:], last.unsqueeze(2))


def block_read(terms: BlockTerms, eps: float | None) -> tuple[Tensor, Tensor | None]:
    """o of the equations, [M, B, n, R * T, dv], and D, if the read is normalised."""
    read = terms.read.weights @ terms.S
    if terms.decays is not None:
        read.mul_(terms.decays.from_start)
    add_product_(read, terms.pairs, terms.value)
    if eps is None:
        return read, None
    total = denominator(terms, eps)
    return read.div_(total), total


def denominator(terms: BlockTerms, eps: float) -> Tensor:
    """D of the equations, [M, B, n, R * T, 1]."""
    from_state = terms.read.weights @ terms.z.unsqueeze(-1)
    if terms.decays is not None:
        from_state = from_state * terms.decays.from_start
    return terms.pairs.sum(dim=-1, keepdim=True) + from_state + eps


class BlockGradient(NamedTuple):
    """Gradients of the inputs of a block, in the layout of the block."""

    query: Tensor
    key: Tensor
    value: Tensor
    coefficients: list[Tensor]  # of linear, quadratic, bias
    write_weight: Tensor | None  # [M, B, n, T]
    log_decay: Tensor | None  # [h, B, n, T]
    S: Tensor  # of the state before the block
    z: Tensor


def block_backward(
    terms: BlockTerms,
    grad_read: Tensor,
    grad_normalizer: Tensor | None,
    grad_S: Tensor,
    grad_z: Tensor,
    eps: float | None,
) -> BlockGradient:
    """
    Gradients of a block from the gradients of its output [M, B, n, R * T, dv], of D as an output, and of the state after it.
    """
    decays, gamma_query = terms.decays, terms.read.weights
    normalize = eps is not None
    if normalize:
        total = denominator(terms, eps)
        grad_read = grad_read / total  # dn
    grad_read = grad_read.contiguous()
    grad_pairs = grad_read @ terms.value.transpose(-1, -2)
    grad_query = grad_read @ terms.S.transpose(-1, -2)
    faded_query = gamma_query  # e gamma^Q
    if decays is not None:
        grad_query.mul_(decays.from_start)
        faded_query = gamma_query * decays.from_start
    grad_total = None
    if normalize:
        # dn_i . n_i is the sum of what dP and dr put on n_i's parts, so that n_i itself is not needed.
        grad_total = -(row_dot(terms.pairs, grad_pairs) + row_dot(gamma_query, grad_query)) / total  # dD
        if grad_normalizer is not None:
            grad_total = grad_total + grad_normalizer
        grad_pairs.add_(grad_total)
        faded_total = grad_total if decays is None else grad_total * decays.from_start
        grad_query.addcmul_(faded_total, terms.z.unsqueeze(-2))

    states = state_gradients(terms, faded_query, grad_read, grad_total, grad_S, grad_z)
    grad_value = terms.pairs.transpose(-1, -2) @ grad_read
    del grad_read, faded_query
    add_product_(grad_value, terms.kept, states.S)
    grad_written = terms.value @ states.S.transpose(-1, -2)
    grad_written.add_(states.z.unsqueeze(-2))

    grad_decay = None
    if decays is None:
        lower_triangle_(grad_pairs, terms.value.shape[3])
    else:
        by_pair = terms.pairs * grad_pairs
        at_read = by_pair.sum(dim=-1) + (gamma_query * grad_query).sum(dim=-1)
        grad_written.mul_(decays.to_end)
        carried = terms.S.mul(states.S).sum(dim=(-1, -2)) + terms.z.mul(states.z).sum(dim=-1)
        grad_decay = log_decay_gradient(
            at_read=at_read.unflatten(3, (-1, terms.value.shape[3])).sum(dim=3),
            at_write=by_pair.sum(dim=-2),
            kept=(terms.written * grad_written).sum(dim=-1),
            carried=carried.unsqueeze(-1) * decays.whole_chunk,
            decays=decays,
        )
        grad_pairs.mul_(decays.pairs)
    first_S, first_z = states.first_S, states.first_z
    add_product_(grad_query, grad_pairs, terms.written)
    add_product_(grad_written, grad_pairs.transpose(-1, -2), gamma_query)
    del states, grad_pairs

    grad_weight = None
    if terms.write_weight is not None:
        grad_weight = (grad_written * terms.write.weights).sum(dim=-1)
        grad_written.mul_(terms.write_weight)
    coefficients = terms.coefficients
    grad_query, *from_query = route_backward(grad_query, terms.read, terms.query, coefficients)
    grad_key, *from_key = route_backward(grad_written, terms.write, terms.key, coefficients)
    grad_coefficients = [a + b for a, b in zip(from_query, from_key, strict=True)]
    return BlockGradient(
        grad_query, grad_key, grad_value, grad_coefficients, grad_weight, grad_decay, first_S, first_z
    )


class StateGradients(NamedTuple):
    """Gradients of the states of a block."""

    S: Tensor  # [M, B, n, C, dv], G_n of the state after chunk n
    z: Tensor  # [M, B, n, C], g_n
    first_S: Tensor  # [M, B, C, dv], of the state before the block
    first_z: Tensor  # [M, B, C]


def state_gradients(terms, faded_query, grad_read, grad_total, grad_S, grad_z) -> StateGradients:
    """From right to left: the transposed decay matrix of the chunks, applied to the reads of every chunk."""
    reads, weights = (faded_query.transpose(-1, -2) @ grad_read).flatten(3), torch.zeros_like(terms.z)
    if grad_total is not None:
        weights = (faded_query.transpose(-1, -2) @ grad_total).squeeze(-1)
    behind, first = terms.chunk_decays[..., 1:].transpose(-1, -2), terms.chunk_decays[..., :1].transpose(-1, -2)
    return StateGradients(
        S=propagate_back(behind, reads, grad_S.flatten(2)).unflatten(-1, grad_S.shape[2:]),
        z=propagate_back(behind, weights, grad_z),
        first_S=propagate_back(first, reads, grad_S.flatten(2)).view_as(grad_S),
        first_z=propagate_back(first, weights, grad_z).view_as(grad_z),
    )


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of the rows, [..., dim] -> [..., 1]."""
    return (a * b).sum(dim=-1, keepdim=True)


def lower_triangle_(pairs: Tensor, chunk: int) -> None:
    """Keep j <= i of pair weights [M, B, n, R * T, T], in place."""
    pairs.unflatten(3, (-1, chunk)).tril_()
