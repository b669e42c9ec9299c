# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The distance of a student from its teacher: in the outputs of its attention, in its logits, in its hidden states."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..calibration.teacher import SoftmaxCall


LARGEST_CHUNK = 2**26  # logits that exist in float32 at the same time, beside the student's own


def attention_distance(call: SoftmaxCall) -> Tensor:
    """
    Relative squared error of the output of the attention, averaged over the heads:

        sum_t ||o_t - o*_t||^2 / sum_t ||o*_t||^2

    t runs over the real tokens; o is of GMA and o* of softmax, before the output projection. There every head has its own
    error, and only the parameters of the head can lower it.
    """
    output, target = call.student().float(), call.output.float()
    error, norm = (output - target).square().sum(dim=-1), target.square().sum(dim=-1)
    real = call.real()
    if real is not None:
        error, norm = error * real[:, None], norm * real[:, None]
    norm = norm.sum(dim=(0, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    return (error.sum(dim=(0, 2)) / norm).mean()


class ReadyGradient(torch.autograd.Function):
    """A number with known gradients for some parameters, so that autograd keeps nothing else."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        return None, None, *(gradient * grad_output for gradient in ctx.gradients)


def with_ready_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The same number. Its gradients are computed now, which frees the memory that autograd kept for them."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    return ReadyGradient.apply(loss.detach(), gradients, *parameters)


class KLDivergence(torch.autograd.Function):
    """
    sum_i w_i T^2 KL(softmax(t_i / T) || softmax(s_i / T)) of rows of logits, chunk by chunk. The gradient T (softmax(s / T)
    - softmax(t / T)) w overwrites the logits of the student.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), device=student.device)
        # A detached tensor still counts its changes, so autograd notices if another operation needs the old values
        rows = student.detach()
        step = max(1, LARGEST_CHUNK // student.shape[-1])
        for start in range(0, rows.shape[0], step):
            chunk = slice(start, start + step)
            student_log, teacher_log = ((x[chunk].float() / temperature).log_softmax(dim=-1) for x in (rows, teacher))
            expected = teacher_log.exp()
            divergence = (expected * (teacher_log - student_log)).sum(dim=-1)
            total += (divergence * weights[chunk]).sum() * temperature**2
            if ctx.needs_input_grad[0]:
                gradient = student_log.exp_().sub_(expected)
                rows[chunk] = gradient.mul_(temperature * weights[chunk, None]).to(rows.dtype)
        ctx.gradient = rows
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        # In place, and only once, because a second copy of all logits may not fit into memory
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_output), None, None, None


def kl_divergence(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """
    KL divergence of the distributions of the student from the distributions of the teacher, in nats, summed with weights.

    Args:
        student (`torch.Tensor` of shape `(..., vocabulary)`): logits. Logits that require gradients are overwritten: do not
            use them afterwards.
        teacher (`torch.Tensor` of the same shape): logits, of any floating dtype.
        weights (`torch.Tensor` of shape `(...)`): weight of each distribution.
        temperature (`float`, *optional*, defaults to `1.0`): T, which divides the logits. The result is multiplied by T^2,
            so the size of its gradient does not depend on T (Hinton et al., arXiv:1503.02531).

    Returns:
        `torch.Tensor`: a float32 scalar.
    """
    size = student.shape[-1]
    return KLDivergence.apply(
        student.reshape(-1, size), teacher.reshape(-1, size), weights.reshape(-1).float(), temperature
    )


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor, kind: str) -> Tensor:
    """
    Distance of hidden states, summed over tokens with weights, and averaged over the layers.

    Args:
        student, teacher (`Sequence[torch.Tensor]` of shape `(batch, length, hidden_size)`): hidden states of the same
        layers.
        weights (`torch.Tensor` of shape `(batch, length)`): weight of each token.
        kind (`str`): "mse": ||s - t||^2 / ||t||^2 per token, so that the few tokens with very large hidden states do not
            decide alone. "cosine": 1 - cos(s, t).

    Returns:
        `torch.Tensor`: a scalar.
    """
    distances = []
    for s, t in zip(student, teacher, strict=True):
        s, t = s.float(), t.float()
        if kind == "cosine":
            distance = 1 - F.cosine_similarity(s, t, dim=-1)
        else:
            distance = (s - t).square().sum(dim=-1) / t.square().sum(dim=-1).clamp(min=1e-12)
        distances.append((distance * weights).sum())
    return torch.stack(distances).mean()


def pooled(hidden: Tensor, real: Tensor, pooling: str) -> Tensor:
    """Embeddings `(batch, hidden_size)` of whole texts: the mean of the real tokens, or the first token ("cls")."""
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = real.to(torch.float32)[..., None]
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    For each row, the sum of the negative log-likelihoods of its tokens given the tokens before, and the number of these
    tokens: `(batch,)` each.
    """
    labels = labels[:, 1:]
    counted = labels != -100
    losses = []
    for row, target in zip(logits[:, :-1], labels, strict=True):
        losses.append(F.cross_entropy(row.float(), target, ignore_index=-100, reduction="sum"))
    return torch.stack(losses), counted.sum(dim=1)


def real_tokens(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    """
    Which outputs of a model belong to real tokens, in the shape `(batch, length)` of the outputs. If a model has one output
    per row, `True` for each row `(batch,)`.
    """
    candidates = (inputs.get(name) for name in ("decoder_attention_mask", "labels", "attention_mask"))
    is_decoder = "decoder_input_ids" in inputs or "decoder_attention_mask" in inputs
    for name, mask in zip(("decoder_attention_mask", "labels", "attention_mask"), candidates, strict=True):
        if not isinstance(mask, Tensor) or mask.shape != shape or len(shape) != 2:
            continue
        if name == "labels" and not is_decoder:
            continue
        return mask != -100 if name == "labels" else mask != 0
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    return torch.ones(shape, dtype=torch.bool, device=device)
