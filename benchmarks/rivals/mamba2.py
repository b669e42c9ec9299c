# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060), a rival of GMA in the benchmarks. Per head, with scalar decay,

    S_t = exp(-A dt_t) S_{t-1} + dt_t B_t x_t^T        y_t = C_t S_t + D x_t

computed in chunks by matrix products (the paper's section 6), in plain PyTorch: the recurrence of Transformers' `Mamba2Mixer`,
whose own program in PyTorch needs memory by the token, the head and the state, too much to train with.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.rivals.linear_attention import padding_mask_of
from gma_hf import GMAConfig
from gma_hf.cache_argument import takes_cache
from gma_hf.modeling.attention_gma import GMARMSNorm
from gma_hf.modeling.layout import Layout


CHUNK_SIZE = 128
# Chunks whose states are combined by one matrix; more chunks are combined block by block
BLOCK_SIZE = 64
EXPAND, HEAD_DIM, STATE_SIZE, CONV_KERNEL_SIZE = 2, 64, 128, 4


def state_space(x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """
    The recurrence above, without D.

    Args:
        x (`Tensor` of shape `(batch, length, heads, dim)`): inputs.
        dt (`Tensor` of shape `(batch, length, heads)`): steps, not negative; zero where a token is padding.
        rate (`Tensor` of shape `(heads,)`): A, positive.
        B, C (`Tensor` of shape `(batch, length, state)`): what writes and what reads, shared by all heads.

    Returns:
        `Tensor` of shape `(batch, length, heads, dim)`: y.
    """
    dt = dt.to(torch.promote_types(x.dtype, torch.float32))
    return decayed_attention(C, B, (x.to(dt.dtype) * dt[..., None]).to(x.dtype), -rate.to(dt.dtype) * dt)


def decayed_attention(C: Tensor, B: Tensor, x: Tensor, log_decay: Tensor) -> Tensor:
    """
    y_t = C_t S_t with S_t = exp(log_decay_t) S_{t-1} + B_t x_t^T. Products in the dtype of `x`, decays and states in float32 at
    least; shapes as in `state_space`, `log_decay` like dt.
    """
    dtype = x.dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    length, heads = x.shape[1:3]
    with torch.autocast(x.device.type, enabled=False):
        log_decay = log_decay.to(accumulator)
        # Zero inputs at the end neither write nor decay
        padding = -length % CHUNK_SIZE
        x = F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, CHUNK_SIZE))
        log_decay, B, C = (
            F.pad(part, (0, 0, 0, padding)).unflatten(1, (-1, CHUNK_SIZE))
            for part in (log_decay, B.to(dtype), C.to(dtype))
        )
        decayed = log_decay.cumsum(dim=2)  # from the start of the chunk to and with each token

        # Within a chunk: token i reads what token j <= i wrote, decayed since
        by_head = decayed.transpose(2, 3)  # [batch, chunks, heads, chunk size]
        is_past = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool, device=x.device).tril()
        decay = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(~is_past, -math.inf).exp()
        scores = (C @ B.transpose(-1, -2))[:, :, None].to(accumulator) * decay
        output = (scores.to(dtype) @ x.transpose(2, 3)).transpose(2, 3)

        # From earlier chunks: what each leaves behind, and what has come together before each
        to_end = (decayed[:, :, -1:] - decayed).exp()
        written = (x.to(accumulator) * to_end[..., None]).to(dtype).flatten(3)
        states = (B.transpose(-1, -2) @ written).to(accumulator).unflatten(-1, (heads, -1))
        states = states_before(states.transpose(2, 3).flatten(3), decayed[:, :, -1])
        states = states.unflatten(-1, (C.shape[-1], -1)).transpose(2, 3).flatten(3)
        earlier = (C @ states.to(dtype)).unflatten(-1, (heads, -1)).to(accumulator) * decayed.exp()[..., None]
        return (output.to(accumulator) + earlier).to(dtype).flatten(1, 2)[:, :length]


def states_before(states: Tensor, log_decay: Tensor) -> Tensor:
    """
    What the recurrence over chunks holds before each chunk, in time linear in their number.

    Args:
        states: `[batch, chunks, heads, size]`, what each chunk adds.
        log_decay: `[batch, chunks, heads]`, by how much each chunk decays what was there.

    Returns:
        `[batch, chunks, heads, size]`: the sum over z < c of `states[z]`, decayed by the chunks between z and c.
    """
    count = states.shape[1]
    if count > BLOCK_SIZE:
        padding = -count % BLOCK_SIZE
        states = F.pad(states, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, BLOCK_SIZE))
        log_decay = F.pad(log_decay, (0, 0, 0, padding)).unflatten(1, (-1, BLOCK_SIZE))
        within = states_before(states.flatten(0, 1), log_decay.flatten(0, 1)).unflatten(0, states.shape[:2])
        added = within[:, :, -1] * log_decay[:, :, -1, :, None].exp() + states[:, :, -1]
        before = states_before(added, log_decay.sum(dim=2))
        since_start = F.pad(log_decay, (0, 0, 1, 0))[:, :, :-1].cumsum(dim=2)
        return (within + before[:, :, None] * since_start[..., None].exp()).flatten(1, 2)[:, :count]
    up_to = log_decay.transpose(1, 2).cumsum(dim=-1)
    before = F.pad(up_to, (1, 0))[..., :-1]
    is_past = torch.ones(count, count, dtype=torch.bool, device=states.device).tril(-1)
    decay = (before[..., :, None] - up_to[..., None, :]).masked_fill(~is_past, -math.inf).exp()
    return (decay @ states.transpose(1, 2)).transpose(1, 2)


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: int | None = None) -> Tensor:
    """
    A depthwise convolution with SiLU, tap by tap: torch.compile makes one kernel of it.

    Args:
        x (`Tensor` of shape `(batch, length, channels)`): zero at padding.
        weight (`Tensor` of shape `(channels, width)`): taps.
        bias (`Tensor` of shape `(channels,)`, *optional*): added.
        before (`int`, *optional*): how many tokens before its own an output sees; by default all but its own, causally.
    """
    length, width = x.shape[1], weight.shape[1]
    before = width - 1 if before is None else before
    padded = F.pad(x, (0, 0, before, width - 1 - before))
    output = sum(padded[:, tap : tap + length] * weight[:, tap].to(x.dtype) for tap in range(width))
    return F.silu(output if bias is None else output + bias.to(x.dtype))


def step_bias_(bias: Tensor, low: float, high: float) -> None:
    """So that softplus of it is log-uniform between `low` and `high`."""
    step = torch.empty_like(bias).uniform_(math.log(low), math.log(high)).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))


class Mamba2Mixer(nn.Module):
    """
    The mixer with the published sizes: twice as wide inside, heads of 64, a state of 128, one group, convolution of width 4
    with SiLU, norm behind the gate. Initialised as published, but for the linear maps, which are as in the other models.
    """

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.inner_size = EXPAND * config.hidden_size
        if self.inner_size % HEAD_DIM != 0:
            raise ValueError(
                f"Mamba-2 has heads of {HEAD_DIM} and is {EXPAND} times as wide inside: `hidden_size` must be a multiple of "
                f"{HEAD_DIM // EXPAND}, got {config.hidden_size}."
            )
        num_heads = self.inner_size // HEAD_DIM
        conv_size = self.inner_size + 2 * STATE_SIZE
        self.sizes = [self.inner_size, conv_size, num_heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_size, CONV_KERNEL_SIZE))
        self.conv_bias = nn.Parameter(torch.empty(conv_size))
        # "bias" in their names keeps the Trainer's weight decay away from them, as it should
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log_bias = nn.Parameter(torch.empty(num_heads))
        self.D_bias = nn.Parameter(torch.empty(num_heads))
        self.norm = GMARMSNorm(self.inner_size, eps=1e-5)
        self.out_proj = nn.Linear(self.inner_size, config.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = CONV_KERNEL_SIZE**-0.5
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        step_bias_(self.dt_bias, self.config.time_step_min, self.config.time_step_max)
        self.A_log_bias.uniform_(1, 16).log_()
        self.D_bias.fill_(1)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        cache=None,
        layout: Layout | None = None,
        is_causal: bool = True,
        **kwargs,
    ) -> tuple[Tensor, None]:
        if not is_causal:
            raise ValueError("Mamba-2 is causal.")
        mask = padding_mask_of(layout, cache)
        if mask is not None:
            mask = mask[..., None].to(hidden_states.dtype)
            hidden_states = hidden_states * mask
        gate, mixed, dt = self.in_proj(hidden_states).split(self.sizes, dim=-1)
        mixed = short_convolution(mixed, self.conv_weight, self.conv_bias)
        dt = F.softplus(dt.float() + self.dt_bias)
        if mask is not None:
            mixed, dt = mixed * mask.to(mixed.dtype), dt * mask
        x, B, C = mixed.split([self.inner_size, STATE_SIZE, STATE_SIZE], dim=-1)
        x = x.unflatten(-1, (-1, HEAD_DIM))
        output = state_space(x, dt, self.A_log_bias.float().exp(), B, C)
        output = (output + self.D_bias.to(x.dtype)[:, None] * x).flatten(2)
        return self.out_proj(self.norm(output.float() * F.silu(gate.float())).to(output.dtype)), None


class Mamba2Layer(GradientCheckpointingLayer):
    """A block as published: the mixer behind a norm and beside a residual, and no MLP."""

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.input_layernorm = GMARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Mamba2Mixer(config, layer_idx)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        return hidden_states + self.dropout(self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0])
