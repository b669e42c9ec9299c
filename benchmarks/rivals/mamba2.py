# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060) as it was published, y_t = C_t S_t + D x_t: the block of mamba-ssm and of Transformers'
`Mamba2Mixer`, whose program in PyTorch needs memory by the token, the head and the state, too much to train with.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.rivals.recurrences import padding_mask_of, short_convolution, state_space, step_bias_
from gma_hf import GMAConfig
from gma_hf.cache_argument import takes_cache
from gma_hf.modeling.attention_gma import GMARMSNorm


EXPAND, HEAD_DIM, STATE_SIZE, CONV_KERNEL_SIZE = 2, 64, 128, 4


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
        self.dt_bias, self.A_log_bias, self.D_bias = (nn.Parameter(torch.empty(num_heads)) for _ in range(3))
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
        if self.config.scale_output_init:  # of one residual a block, as Mamba-2 does it
            self.out_proj.weight.mul_(self.config.num_hidden_layers**-0.5)

    @takes_cache
    def forward(self, hidden_states, cache=None, layout=None, is_causal: bool = True, **kwargs):
        if not is_causal:
            raise ValueError("Mamba-2 is causal.")
        mask = padding_mask_of(layout, cache is not None)
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
