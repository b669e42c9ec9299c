# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The delta rule: a token writes the difference between its value and what the memory already says for its key.

    u_t = beta_t (v_t - a_t rho(k_t) S_{t-1})        the correction that the token writes
    S_t = a_t S_{t-1} + w_t rho(k_t) u_t^T           the memory of every other call, with u_t instead of v_t

So the delta rule changes what is written, and nothing else: every backend computes such a call with the values u. (Widrow and
Hoff, 1960; as the update of a memory: Schlag et al., arXiv:2102.11174; with forgetting: Yang et al., arXiv:2412.06464. With
beta = 1 and a route of unit length, the memory says v_t exactly when it is asked for k_t again.) Without correlation, gamma
replaces rho.

In a chunk of T tokens behind a state S, with P_t what a chunk's start has left at t and D_tj what token j has left at t:

    u_t + beta_t sum_{j < t} D_tj (rho_t . rho_j) w_j u_j = beta_t (v_t - P_t rho_t S)
    U = K - G S,    K = (I + L)^-1 beta V,    G = (I + L)^-1 beta P R,    L_tj = beta_t D_tj (rho_t . rho_j) w_j    (j < t)
    S' = P_T S + A^T U,    A_j = D_Tj w_j rho_j

Only the last line, which hands S from chunk to chunk, has to wait for the chunk before. The rest is computed for all chunks at
once (the WY form: Yang et al., arXiv:2406.06484).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat import is_exporting_to_onnx, is_transformed
from ..dispatch import Way
from ..operators import differentiate_once, on_one_device, vmapped_by_loops
from .call import DELTA_RULE, AttentionCall
from .mixture import MixtureCoefficients, mixture_coefficients, repeat_heads, responsibilities, unwritten_as_zero
from .reference import segment_sums


CHUNK_SIZE = 64


def with_corrections(call: AttentionCall) -> AttentionCall:
    """The call that computes the same without the delta rule: its values are the corrections u, one head per mixture."""
    if is_exporting_to_onnx():
        raise ValueError(
            "The delta rule cannot be exported to ONNX, which has no operator for triangular systems. Export a model with "
            "`use_delta_rule=False`, for example the preset 'correlated'."
        )
    mixtures, dtype = call.means.shape[0], call.state_dtype
    key, value = (unwritten_as_zero(repeat_heads(x, mixtures), call.write_weight) for x in (call.key, call.value))
    route = responsibilities(key, kept_mixture(call), call.correlate)
    strength = call.delta_strength.to(dtype)
    weight, log_decay = (None if x is None else x.to(dtype) for x in (call.write_weight, call.log_decay))
    S = None if call.initial_state is None else call.initial_state[0].to(dtype)
    length = value.shape[2]
    if isinstance(length, int) and length == 1:
        corrections = correction_of_one(route, value, strength, log_decay, S)
    else:
        corrections = corrections_in_chunks(route, value, strength, weight, log_decay, S)
    return call._replace(key=key, value=corrections, delta_strength=None)


def kept_mixture(call: AttentionCall) -> MixtureCoefficients:
    """The coefficients of the mixture, from the kept values of the caller if there are any."""
    dtype, floor, parameters = call.state_dtype, call.variance_floor, call[3:6]

    def compute(*parameters: Tensor) -> MixtureCoefficients:
        return mixture_coefficients(*parameters, floor, dtype)

    return compute(*parameters) if call.kept is None else call.kept.get(("routes", dtype), parameters, compute)


def correction_of_one(
    route: Tensor, value: Tensor, strength: Tensor, log_decay: Tensor | None, S: Tensor | None
) -> Tensor:
    """u of one token, [B, M, 1, dv]: the equation at the top."""
    strength = strength.unsqueeze(-1)
    if S is None:
        return (strength * value).to(value.dtype)
    known = route @ S
    if log_decay is not None:
        known = known * log_decay.exp().unsqueeze(-1)
    return (strength * (value - known)).to(value.dtype)


def corrections_in_chunks(
    route: Tensor, value: Tensor, strength: Tensor, weight: Tensor | None, log_decay: Tensor | None, S: Tensor | None
) -> Tensor:
    """
    u of all tokens, in chunks.

    Args:
        route (`torch.Tensor` of shape `(B, M, N, C)`): rho, in the precision of the state.
        value (`torch.Tensor` of shape `(B, M, N, dv)`): v.
        strength (`torch.Tensor` of shape `(B, M or 1, N)`): beta.
        weight (`torch.Tensor` of shape `(B, M or 1, N)`, *optional*): w, by default 1.
        log_decay (`torch.Tensor` of shape `(B, M or 1, N)`, *optional*): log a, by default 0; -inf is possible.
        S (`torch.Tensor` of shape `(B, M, C, dv)`, *optional*): the state before the first token, by default 0.

    Returns:
        `torch.Tensor` of shape `(B, M, N, dv)`: u, in the dtype of `value`.
    """
    if weight is None:
        weight = torch.ones_like(strength[:, :1])
    if log_decay is None:
        log_decay = torch.zeros_like(strength[:, :1])
    if S is None:
        S = route.new_zeros(*route.shape[:2], route.shape[-1], value.shape[-1])
    given = route, value, strength, weight, log_decay, S
    if is_transformed():  # a derivative of any order and mode
        return corrections_and_states(*given)[0]
    return Corrections.apply(*given)[0]


class ChunkTerms(NamedTuple):
    """What all chunks have without the state before them: [B, M or 1, n, T, ...]."""

    route: Tensor  # R
    write: Tensor  # w R
    value: Tensor  # V
    strength: Tensor  # beta [..., 1]
    weight: Tensor  # w [..., 1]
    left: Tensor  # D [..., T, T]
    from_start: Tensor  # P [..., 1]
    system: Tensor  # I + L
    solved: Tensor  # K beside G

    @property
    def to_end(self) -> Tensor:
        """D_Tj [..., 1]."""
        return self.left[..., -1, :].unsqueeze(-1)

    @property
    def whole(self) -> Tensor:
        """P_T, [B, M, n]."""
        return self.from_start[..., -1, 0].expand(*self.route.shape[:3])

    def for_states(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """K, G and A in the precision of the products."""
        kept, lost = self.solved.split([self.value.shape[-1], self.route.shape[-1]], dim=-1)
        return kept.to(dtype), lost.to(dtype), (self.write * self.to_end).to(dtype)


def in_chunks(x: Tensor) -> Tensor:
    """[B, M, N, ...] -> [B, M, n, T, ...]. The last chunk is filled up with tokens that write nothing."""
    length = x.shape[2]
    size = max(1, min(CHUNK_SIZE, length))
    return F.pad(x, (0, 0, 0, -length % size)).unflatten(2, (-1, size))


def chunk_terms(route: Tensor, value: Tensor, strength: Tensor, weight: Tensor, log_decay: Tensor) -> ChunkTerms:
    """The equations at the top, but the last."""
    route, value = in_chunks(route), in_chunks(value.to(route.dtype))
    strength, weight, log_decay = (in_chunks(x.unsqueeze(-1)) for x in (strength, weight, log_decay))
    write, from_start = route * weight, log_decay.cumsum(dim=-2).exp()
    left = segment_sums(log_decay.squeeze(-1)).exp()
    lower = (strength * left * (route @ write.mT)).tril(-1)
    system = lower + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    known = torch.cat([strength * value, strength * from_start * route], dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    return ChunkTerms(route, write, value, strength, weight, left, from_start, system, solved)


def corrections_and_states(
    route: Tensor, value: Tensor, strength: Tensor, weight: Tensor, log_decay: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """u [B, M, N, dv], and S before every chunk and after the last [B, M, n + 1, C, dv]."""
    terms = chunk_terms(route, value, strength, weight, log_decay)
    corrections, states = [], []
    whole, parts = terms.whole[..., None, None].unbind(2), (x.unbind(2) for x in terms.for_states(value.dtype))
    for p, K, G, A in zip(whole, *parts, strict=True):
        states.append(S)
        corrections.append(K - G @ S.to(K.dtype))
        S = p * S + (A.mT @ corrections[-1]).to(S.dtype)
    states = torch.stack([*states, S], dim=2)
    if not corrections:
        return torch.zeros_like(value), states
    return torch.cat(corrections, dim=2)[:, :, : value.shape[2]].contiguous(), states


def corrections_gradients(
    grad: Tensor, route: Tensor, value: Tensor, strength: Tensor, weight: Tensor, log_decay: Tensor, corrections: Tensor,
    states: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """
    Gradients of route, value, strength, weight, log_decay and S.

    With dS' the gradient of the state behind a chunk, that of U is dU + A dS', and dS = P_T dS' - G^T (dU + A dS'). The rest is
    the chain rule through the triangular system, X = (I + L)^-1 Y: dY = (I + L)^-T dX, dL = -dY X^T below the diagonal. Each
    log a_l is in P_i for i >= l, in D_Tj for j < l, and in D_ij for i >= l > j.
    """
    states = states[:, :, :-1]
    terms, dtype, length = chunk_terms(route, value, strength, weight, log_decay), value.dtype, value.shape[2]
    grad, corrections = in_chunks(grad), in_chunks(corrections)
    _, lost, added = terms.for_states(dtype)
    whole, grad_S = terms.whole[..., None, None], torch.zeros_like(states[:, :, 0])
    behind, totals = [], []
    for i in reversed(range(states.shape[2])):
        behind.append(grad_S)
        totals.append(grad[:, :, i] + added[:, :, i] @ grad_S.to(dtype))
        grad_S = whole[:, :, i] * grad_S - (lost[:, :, i].mT @ totals[-1]).to(grad_S.dtype)
    grad_behind, total = torch.stack(behind[::-1], dim=2), torch.stack(totals[::-1], dim=2)

    # Through the states: K, G, A and P_T
    grad_solved = torch.cat([total, -(total @ states.to(dtype).mT)], dim=-1).to(states.dtype)
    grad_added = (corrections @ grad_behind.to(dtype).mT).to(states.dtype)
    of_whole = (grad_behind * states).sum(dim=(-2, -1)) * terms.whole
    # Through the triangular system: its right side, beta V beside beta P R, and L
    grad_known = torch.linalg.solve_triangular(terms.system.mT, grad_solved, upper=True, unitriangular=True)
    grad_lower = -(grad_known @ terms.solved.mT).tril(-1)
    of_value, of_route = grad_known.split([value.shape[-1], route.shape[-1]], dim=-1)
    # Through L = beta D (R w R^T)
    pairs = terms.left * (terms.route @ terms.write.mT)
    grad_pairs = grad_lower * terms.strength * terms.left
    of_lower = grad_lower * terms.strength * pairs  # the gradient of log D

    grad_write = grad_pairs.mT @ terms.route + terms.to_end * grad_added
    grad_route = grad_pairs @ terms.write + terms.strength * terms.from_start * of_route + terms.weight * grad_write
    of_start = (of_route * terms.from_start * terms.route).sum(dim=-1)
    grad_strength = (grad_lower * pairs).sum(dim=-1) + (of_value * terms.value).sum(dim=-1) + of_start
    of_start = of_start * terms.strength.squeeze(-1)  # the gradient of log P
    of_start[..., -1] += of_whole
    of_end = (grad_added * terms.write * terms.to_end).sum(dim=-1)  # the gradient of log D_T
    grad_decay = backward_cumsum(of_start, -1) + of_end.cumsum(dim=-1) - of_end
    grad_decay = grad_decay + backward_cumsum(of_lower, -2).tril(-1).sum(dim=-1)
    grad_weight = (grad_write * terms.route).sum(dim=-1)

    def joined(x: Tensor, given: Tensor) -> Tensor:
        """In the shape of the argument: the tokens of all chunks, and a head for all mixtures where there is one."""
        x = x.flatten(2, 3)[:, :, :length]
        return x.sum_to_size(given.shape).to(given.dtype).contiguous()

    gradients = (grad_route, terms.strength * of_value, grad_strength, grad_weight, grad_decay)
    given = (route, value, strength, weight, log_decay)
    return *(joined(x, of) for x, of in zip(gradients, given, strict=True)), grad_S


def backward_cumsum(x: Tensor, dim: int) -> Tensor:
    """The sum of an entry and all entries behind it."""
    return x.flip(dim).cumsum(dim).flip(dim)


# The two passes are opaque operators to torch.compile and torch.export: lengths stay dynamic, and no loop is unrolled


@torch.library.custom_op("gma_hf::corrections", mutates_args=())
@on_one_device
def corrections_forward(
    route: Tensor, value: Tensor, strength: Tensor, weight: Tensor, log_decay: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """See `corrections_and_states`."""
    return corrections_and_states(route, value, strength, weight, log_decay, S)


@corrections_forward.register_fake
@on_one_device
def _(route, value, strength, weight, log_decay, S):
    # With the state after the last chunk there are at least two, so no open length is fixed to one chunk
    count = (value.shape[2] + CHUNK_SIZE - 1) // CHUNK_SIZE + 1
    return value.new_empty(value.shape), S.new_empty(*S.shape[:2], count, *S.shape[2:])


vmapped_by_loops("corrections")


@torch.library.custom_op("gma_hf::corrections_backward", mutates_args=())
@on_one_device
def corrections_backward(
    grad: Tensor, route: Tensor, value: Tensor, strength: Tensor, weight: Tensor, log_decay: Tensor, corrections: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `corrections_gradients`."""
    with torch.autocast(device_type=grad.device.type, enabled=False):
        return corrections_gradients(grad, route, value, strength, weight, log_decay, corrections, states)


@corrections_backward.register_fake
@on_one_device
def _(grad, route, value, strength, weight, log_decay, corrections, states):
    arguments = (route, value, strength, weight, log_decay)
    sizes = (*states.shape[:2], *states.shape[3:])
    return *(x.new_empty(x.shape) for x in arguments), states.new_empty(sizes)


vmapped_by_loops("corrections_backward")


class Corrections(torch.autograd.Function):
    """u of all tokens and the states before the chunks; see `corrections_and_states`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(route, value, strength, weight, log_decay, S):
        return corrections_forward(route, value, strength, weight, log_decay, S)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:-1], *output)

    @staticmethod
    def backward(ctx, grad, _):
        return differentiate_once(corrections_backward, grad, *ctx.saved_tensors)


DELTA_RULE.register(Way("corrections", run=with_corrections))
