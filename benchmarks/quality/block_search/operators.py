# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The sequence mixers that the search compares, in plain PyTorch.

A mixer turns queries and keys into features and reads a decayed memory,

    o_t = sum_{j <= t} exp(l_{j+1} + ... + l_t) w_j (f(q_t) . f(k_j) + lambda) v_j

with log decays l and write weights w. `GatedDelta` replaces the update by the delta rule. Every tensor has the leading
dimensions `[models, heads, rows]`: several models of one architecture are computed side by side.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


CHUNK_SIZE = 64
NOTHING = -1e9  # the logarithm of a weight of zero, finite so that gradients stay finite


def chunk_mask(length: int, sequence_length: int, device) -> Tensor:
    """Which earlier chunks each chunk of a row sees, `[chunks, chunks]`: those of its own sequence."""
    count = max(1, length // CHUNK_SIZE)
    sequence = torch.arange(count, device=device) * CHUNK_SIZE // sequence_length
    is_earlier = torch.ones(count, count, dtype=torch.bool, device=device).tril(-1)
    return (sequence[:, None] == sequence) & is_earlier


def decayed_read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write_weight: Tensor,
    log_decay: Tensor,
    earlier: Tensor,
    share: Tensor | None = None,
) -> Tensor:
    """
    The equation above, in chunks.

    Args:
        query, key: features, `[..., length, features]`.
        value: `[..., length, dim]`, of the dtype of the matrix products.
        write_weight, log_decay: `[..., length]`, float32.
        earlier: of `chunk_mask`.
        share: lambda, which broadcasts to `[..., chunks, chunk, chunk]`.

    Returns:
        o, `[..., length, dim]`, float32.
    """
    size = min(CHUNK_SIZE, value.shape[-2])
    query, key, value = (x.unflatten(-2, (-1, size)) for x in (query, key, value))
    write_weight, log_decay = write_weight.unflatten(-1, (-1, size)), log_decay.unflatten(-1, (-1, size))
    decayed = log_decay.cumsum(-1)  # from the start of the chunk to and with each token

    # Within a chunk
    is_past = torch.ones(size, size, dtype=torch.bool, device=value.device).tril()
    weights = (decayed[..., :, None] - decayed[..., None, :]).masked_fill(~is_past, NOTHING).exp()
    weights = weights * write_weight[..., None, :]
    affinity = (query @ key.transpose(-1, -2)).float()
    if share is not None:
        affinity = affinity + share
    output = ((affinity * weights).to(value.dtype) @ value).float()
    if len(earlier) == 1:
        return output.flatten(-3, -2)

    # From earlier chunks: what each leaves behind, and what has come together before each
    total = decayed[..., -1].cumsum(-1)
    before = total - decayed[..., -1]
    between = (before[..., :, None] - total[..., None, :]).masked_fill(~earlier, NOTHING).exp()
    to_end = (decayed[..., -1:] - decayed).exp() * write_weight
    written = (value.float() * to_end[..., None]).to(value.dtype)
    states = (key.transpose(-1, -2) @ written).float()
    states = (between @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
    read = (query @ states.to(value.dtype)).float()
    if share is not None:
        read = read + share * (between @ written.float().sum(-2))[..., None, :]
    return (output + decayed.exp()[..., None] * read).flatten(-3, -2)


def delta_rule_read(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, earlier: Tensor
) -> Tensor:
    """
    The gated delta rule (Yang et al., 2024, arXiv:2412.06464), chunk by chunk in float32:

        S_t = exp(l_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,        o_t = S_t^T q_t

    Args:
        query, key: of unit length, `[..., length, features]`.
        value, log_decay, earlier: as for `decayed_read`.
        beta: `[..., length]`, in [0, 1].

    Returns:
        o, `[..., length, dim]`.
    """
    size = min(CHUNK_SIZE, value.shape[-2])
    query, key, value = (x.float().unflatten(-2, (-1, size)) for x in (query, key, value))
    beta, log_decay = beta.unflatten(-1, (-1, size)), log_decay.unflatten(-1, (-1, size))
    decayed = log_decay.cumsum(-1)
    is_past = torch.ones(size, size, dtype=torch.bool, device=value.device).tril()
    decay = (decayed[..., :, None] - decayed[..., None, :]).masked_fill(~is_past, NOTHING).exp()
    weighted_key = key * beta[..., None]
    mixed = ((weighted_key @ key.transpose(-1, -2)) * decay).masked_fill(~is_past.tril(-1), 0.0)
    # (I + A)^-1 of a strictly lower triangular A is the product of I + (-A)^1, I + A^2, I + A^4, ...
    inverse, power, reached = torch.eye(size, device=value.device) - mixed, mixed @ mixed, 2
    while reached < size:
        inverse, power, reached = inverse + inverse @ power, power @ power, 2 * reached
    new_value = inverse @ (value * beta[..., None])
    seen_key = inverse @ (weighted_key * decayed.exp()[..., None])
    affinity = (query @ key.transpose(-1, -2)) * decay

    state = torch.zeros(*value.shape[:-3], key.shape[-1], value.shape[-1], device=value.device)
    continues = torch.cat([earlier.new_zeros(1), earlier.diagonal(-1)]).float()
    outputs = []
    for i in range(len(earlier)):
        state = state * continues[i]
        change = new_value[..., i, :, :] - seen_key[..., i, :, :] @ state
        from_state = (query[..., i, :, :] * decayed[..., i, :, None].exp()) @ state
        outputs.append(from_state + affinity[..., i, :, :] @ change)
        last = decayed[..., i, -1:]
        leaving = key[..., i, :, :] * (last - decayed[..., i, :]).exp()[..., None]
        state = state * last[..., None].exp() + leaving.transpose(-1, -2) @ change
    return torch.stack(outputs, dim=-3).flatten(-3, -2)


def unit_length(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def features(x: Tensor, parameters: dict[str, Tensor], block) -> Tensor:
    """
    What a mixer compares of queries and keys.

    Args:
        x: `[models, heads, tokens, dim]`, float32.
        parameters: of the layer; a mixture has `means`, `raw_variances` `[models, heads, components, dim]` and
            `prior_logits` `[models, heads, components]`.
        block: a `Block` of `model.py`.

    Returns:
        `[models, heads, tokens, features]`, float32.
    """
    if block.mixer == "mamba2_like":
        return x
    if block.mixer in ("linear", "gated_delta"):
        return unit_length(x, 1e-6)
    variance = F.softplus(parameters["raw_variances"]) + 1e-4
    precision = 1 / variance
    means = parameters["means"]
    # The average precision weighs x^2 alike in all components: the softmax does not see it
    weights = torch.cat([means * precision, 0.5 * (precision.mean(-2, keepdim=True) - precision)], dim=-1)
    bias = parameters["prior_logits"] - 0.5 * (variance.log() + means.square() * precision).sum(-1)
    inputs = torch.cat([x, x * x], dim=-1).flatten(0, 1)
    logits = torch.bmm(inputs, weights.transpose(-1, -2).flatten(0, 1)).view(*x.shape[:3], -1) + bias[:, :, None]
    components = logits.shape[-1]
    if block.mixer == "signed_sigmoids":
        result = torch.tanh(0.5 * logits) * components**-0.5
    else:
        size = components // block.mixtures
        result = logits.unflatten(-1, (-1, size)).softmax(-1).flatten(-2)
        if block.relative:
            result = (result * size - 1) * components**-0.5
    return unit_length(result, 1e-8) if block.unit_length else result
