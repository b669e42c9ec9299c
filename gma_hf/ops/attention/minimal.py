# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The chunked causal pass in four readable steps. `chunked/causal.py` and the kernels compute the same faster. This file has no
hand-written gradient, no blocks, and no protection against rounding.

    S_t = a_t S_{t-1} + w_t gamma(k_t) v_t^T        the values in the components     [C, dv]
    z_t = a_t z_{t-1} + w_t gamma(k_t)              the weights in the components    [C]
    o_t = gamma(q_t) S_t / (gamma(q_t) z_t + eps)   the read of the token            [dv]

B sequences of N = n T tokens, in n chunks of T tokens; H heads, each with a mixture of C components.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def posterior(x: Tensor, means: Tensor, variances: Tensor, log_priors: Tensor) -> Tensor:
    """gamma_c(x) = softmax_c( log pi_c - 1/2 sum_m [ log sigma^2_cm + (x_m - mu_cm)^2 / sigma^2_cm ] ), [B, H, N, C]."""
    distances = (x[:, :, :, None] - means[None, :, None]).square() / variances[None, :, None]  # [B, H, N, C, d]
    return (log_priors[:, None] - 0.5 * (variances.log()[:, None] + distances).sum(-1)).softmax(-1)


def minimal_attention(
    query, key, value, means, variances, log_priors, write_weight, log_decay, eps=1e-6, chunk=64
) -> Tensor:  # fmt: skip
    """
    Compute causal Gaussian mixture attention chunk by chunk.

    Args:
        query, key (`torch.Tensor` of shape `(B, H, N, d)`): queries and keys.
        value (`torch.Tensor` of shape `(B, H, N, dv)`): values.
        means, variances (`torch.Tensor` of shape `(H, C, d)`): means and variances of the mixtures.
        log_priors (`torch.Tensor` of shape `(H, C)`): logarithms of the priors.
        write_weight (`torch.Tensor` of shape `(B, H, N)`): w >= 0; 0 at padding.
        log_decay (`torch.Tensor` of shape `(B, H, N)`): log a, finite and <= 0.
        eps (`float`, *optional*, defaults to `1e-6`): constant added to the normaliser.
        chunk (`int`, *optional*, defaults to `64`): T, which divides N.

    Returns:
        `torch.Tensor` of shape `(B, H, N, dv)`: the output.
    """
    # 1. Route. Every token gets its responsibilities; a column of ones beside the values accumulates z beside S.
    read = posterior(query, means, variances, log_priors).unflatten(2, (-1, chunk))  # [B, H, n, T, C]
    write = posterior(key, means, variances, log_priors) * write_weight[..., None]
    write = write.unflatten(2, (-1, chunk))  # [B, H, n, T, C]
    value = F.pad(value, (0, 1), value=1.0).unflatten(2, (-1, chunk))  # [B, H, n, T, dv + 1]
    passed = log_decay.unflatten(2, (-1, chunk)).cumsum(-1)  # [B, H, n, T], log of what a chunk's start has left at i

    # 2. Inside a chunk: pairs of tokens, token i reads what j <= i wrote and a_{j+1} ... a_i have left of it.
    left = (passed[..., :, None] - passed[..., None, :]).tril().exp().tril()  # [B, H, n, T, T]
    inside = (read @ write.mT * left) @ value  # [B, H, n, T, dv + 1]

    # 3. Between chunks: what each chunk adds to the memory, and the memory before it, one chunk after the other.
    to_end = (passed[..., -1:] - passed).exp()[..., None]  # [B, H, n, T, 1]
    added = (write * to_end).mT @ value  # [B, H, n, C, dv + 1]
    whole = passed[..., -1].exp()[..., None, None]  # [B, H, n, 1, 1]
    memory = [torch.zeros_like(added[:, :, 0])]
    for i in range(added.shape[2] - 1):
        memory.append(whole[:, :, i] * memory[i] + added[:, :, i])
    memory = torch.stack(memory, dim=2)  # [B, H, n, C, dv + 1], [S | z] before every chunk

    # 4. Read: what the memory held before the chunk, faded, and what the chunk itself wrote; divide by the weight of both.
    total = (passed.exp()[..., None] * (read @ memory) + inside).flatten(2, 3)  # [B, H, N, dv + 1]
    return total[..., :-1] / (total[..., -1:] + eps)
