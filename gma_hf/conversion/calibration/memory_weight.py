# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The first weight of the memory behind a window. The memory gets the share of attention that softmax pays to the tokens in the
memory: on average and, in causal layers, also in its growth with the n tokens that have left the window.

    l_i = log-odds of the share of the memory for query i, with a = b = 0; t_i = share of softmax for the tokens in the memory
    x_i = log(1 + n_i / W)
    p_i = sigmoid(l_i + a - b x_i)

    sum_i (p_i - t_i) = 0        gives a, the bias
    sum_i (p_i - t_i) x_i = 0    gives b, the dilution, between 0 (the memory is a sum over tokens) and 1 (it becomes a mean)

This is the maximum of the likelihood of a logistic regression, which is concave. Bisection finds b, and for every b it finds
a.
"""

import torch
from torch import Tensor, nn

from .teacher import SoftmaxCall


LARGEST_SHIFT = 30.0  # of the log-odds of memory against window, at once
EXTREME_SHARE = 1e-6  # shares closer to 0 or 1 have lost their digits
FEWEST_WINDOWS = 2  # in a memory, for a measurement of its growth


def balance_memory(call: SoftmaxCall, real: Tensor | None, far: Tensor) -> None:
    """
    Set the bias and, in causal layers, the dilution of each head, so that the share of the memory has the mean of `far`
    `(batch, num_heads, length)` and grows like `far`.
    """
    window = call.layer.window_norm
    window.memory_bias.zero_()
    window.memory_dilution.zero_()
    num_windows = tokens_in_memory(call, real).expand(far.shape) / window.window_size
    has_memory = num_windows > 0 if real is None else (num_windows > 0) & real[:, None]
    growth = num_windows.log1p()
    grows = call.layer.is_causal and bool((num_windows >= FEWEST_WINDOWS).any())
    # Bias and dilution are added to the log-odds of memory against window, so one measurement gives the share for all values.
    # Only shares of exactly 0 or 1 have to be measured again after a change
    for _ in range(3):
        share = memory_share(call).float()
        log_odds = torch.logit(share, eps=EXTREME_SHARE)
        if grows:
            dilution = window.memory_dilution.float()
            change = trend(log_odds, far, growth, has_memory, -dilution, 1 - dilution)
            window.memory_dilution.add_(change)
            log_odds = log_odds - change[:, None] * growth
        window.memory_bias.add_(offset(log_odds, far, has_memory))
        is_extreme = ((share < EXTREME_SHARE) & (share > 0)) | (share > 1 - EXTREME_SHARE)
        if not (is_extreme & has_memory).any():
            return


def offset(log_odds: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """The number `(num_heads,)` that each head adds to its log-odds, so that its shares have the mean of `target`."""
    aim = (target * counted).sum(dim=(0, 2))
    low, high = torch.full_like(aim, -LARGEST_SHIFT), torch.full_like(aim, LARGEST_SHIFT)
    for _ in range(30):
        middle = (low + high) / 2
        total = (torch.sigmoid(log_odds + middle[:, None]) * counted).sum(dim=(0, 2))
        low, high = torch.where(total < aim, middle, low), torch.where(total < aim, high, middle)
    return (low + high) / 2


def trend(log_odds: Tensor, target: Tensor, x: Tensor, counted: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """
    The factor `(num_heads,)` of `x` by which each head lowers its log-odds, so that its shares grow with `x` like `target`.
    """
    for _ in range(10):
        middle = (low + high) / 2
        lowered = log_odds - middle[:, None] * x
        shares = torch.sigmoid(lowered + offset(lowered, target, counted)[:, None])
        grows_more = ((shares - target) * x * counted).sum(dim=(0, 2)) > 0
        low, high = torch.where(grows_more, middle, low), torch.where(grows_more, high, middle)
    return torch.where(grows_more, high, low)


def tokens_in_memory(call: SoftmaxCall, real: Tensor | None) -> Tensor:
    """The number n of tokens in the memory of every query, `(batch or 1, 1, length)`."""
    window, length = call.layer.window_norm, call.query.shape[2]
    if real is None:
        real = torch.ones(1, length, dtype=torch.bool, device=call.query.device)
    if not call.layer.is_causal:
        return real.sum(dim=1, keepdim=True).expand_as(real)[:, None]
    return (real.cumsum(dim=1) - window.window_size - window.num_sink_tokens).clamp(min=0)[:, None]


def memory_share(call: SoftmaxCall) -> Tensor:
    """
    The share of the attention that goes to the memory, `(batch, num_heads, length)`: the values are 1 in the memory and 0 in
    the window.
    """

    def mark(mixture: nn.Module, arguments: tuple) -> tuple:
        query, key, value = arguments
        return query, key, torch.ones_like(value)

    handle = call.layer.mixture_norm.register_forward_pre_hook(mark)
    try:
        return call._replace(value=torch.zeros_like(call.value)).student()[..., 0]
    finally:
        handle.remove()


def far_mass(call: SoftmaxCall, real: Tensor | None) -> Tensor:
    """
    The share of the attention of softmax that goes to tokens outside of the window, sink tokens excepted, `(batch,
    num_heads, length)`; zero at padding.
    """
    layer = call.layer
    size, length = layer.window_norm.window_size, call.query.shape[2]
    num_sinks = layer.window_norm.num_sink_tokens
    index = torch.arange(length, device=call.query.device)
    distance = index[:, None] - index
    is_far = distance >= size if layer.is_causal else distance.abs() > size
    is_visible = distance >= 0 if layer.is_causal else torch.ones_like(is_far)
    scaling = layer.routing_dim**-0.5 if call.scaling is None else call.scaling
    softcap, sinks = call.arguments.get("softcap"), call.arguments.get("s_aux")
    rows = []
    for row in range(call.query.shape[0]):
        key = call.key[row].repeat_interleave(layer.num_heads // call.key.shape[1], dim=0)
        with torch.autocast(key.device.type, enabled=False):
            logits = (call.query[row].float() @ key.float().transpose(1, 2)) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        visible = is_visible if real is None else is_visible & real[row]
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        if sinks is not None:
            logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, length, 1)], dim=-1)
        in_memory = is_far
        if num_sinks > 0:
            rank = index if real is None else real[row].cumsum(dim=0) - 1
            in_memory = is_far & (rank >= num_sinks)
        mass = (logits.softmax(dim=-1)[..., :length] * in_memory).sum(dim=-1)
        rows.append(mass if real is None else mass * real[row])
    return torch.stack(rows)
