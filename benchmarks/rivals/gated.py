# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Other mixers in the gated block of GMA: short convolution with SiLU before queries, keys and values, a learned step with decay as
in Mamba-2, a norm per head, an output gate. So nothing but the mixer differs from `GMAConfig.from_preset("gated")`.

To add a mixer, write a subclass of `GatedMixer` with one method, `mix`, and an entry in `mixers.MIXERS`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from benchmarks.rivals.linear_attention import padding_mask_of
from benchmarks.rivals.mamba2 import decayed_attention, short_convolution, step_bias_
from gma_hf import GMAConfig
from gma_hf.cache_argument import takes_cache
from gma_hf.modeling.attention_gma import GMARMSNorm
from gma_hf.modeling.layout import Layout


class GatedMixer(nn.Module):
    """The block around `mix`, in plain PyTorch; it takes what GMA layers take but caches and packed sequences."""

    uses_step = True

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.config, self.head_dim, heads = config, config.head_dim, config.num_attention_heads
        width = heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            nn.Linear(config.hidden_size, width, bias=False) for _ in range(4)
        )
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * width, config.conv_kernel_size))
        self.o_norm = GMARMSNorm(config.head_dim, config.rms_norm_eps)
        if self.uses_step:
            self.dt_proj = nn.Linear(config.hidden_size, heads, bias=False)
            # "bias" in the names keeps the Trainer's weight decay away from them, as it should
            self.dt_bias = nn.Parameter(torch.empty(heads))
            self.A_log_bias = nn.Parameter(torch.empty(heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.conv_weight.shape[1] ** -0.5
        self.conv_weight.uniform_(-bound, bound)
        if self.uses_step:
            step_bias_(self.dt_bias, self.config.time_step_min, self.config.time_step_max)
            self.A_log_bias.uniform_(*self.config.decay_rate_range).log_()

    def mix(self, query, key, value, *, step, log_decay, mask, is_causal) -> Tensor:
        """
        What the heads read.

        Args:
            query, key, value (`Tensor` of shape `(batch, length, heads, head_dim)`): after convolution and SiLU.
            step, log_decay (`Tensor` of shape `(batch, length, heads)`): not negative, and not positive; zero at padding.
                None if the class does not use them.
            mask (`Tensor` of shape `(batch, length)`, *optional*): true at real tokens.
            is_causal (`bool`): whether token i sees j <= i only.

        Returns:
            `Tensor` of shape `(batch, length, heads, head_dim)`.
        """
        raise NotImplementedError

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        cache=None,
        layout: Layout | None = None,
        is_causal: bool = True,
        **kwargs,
    ) -> tuple[Tensor, None]:
        mask = padding_mask_of(layout, cache)
        if mask is not None:
            hidden_states = hidden_states * mask[..., None]
        states = torch.cat([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        before = None if is_causal else self.conv_weight.shape[1] // 2
        states = short_convolution(states, self.conv_weight, before=before)
        query, key, value = states.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        step = log_decay = None
        if self.uses_step:
            step = F.softplus(self.dt_proj(hidden_states).float() + self.dt_bias)
            step = step if mask is None else step * mask[..., None]
            log_decay = -self.A_log_bias.float().exp() * step
        output = self.mix(query, key, value, step=step, log_decay=log_decay, mask=mask, is_causal=is_causal)
        gate = F.silu(self.g_proj(hidden_states))
        return self.o_proj(self.o_norm(output).flatten(2).to(gate.dtype) * gate), None


class UnitLinearAttention(GatedMixer):
    """Linear attention with queries and keys of unit length: S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t."""

    def mix(self, query, key, value, *, step, log_decay, mask, is_causal) -> Tensor:
        query, key = (F.normalize(x.float(), dim=-1).to(value.dtype) for x in (query, key))
        return self.read(query, key, value, log_decay, mask, is_causal)

    @staticmethod
    def read(query, key, value, log_decay, mask, is_causal) -> Tensor:
        if not is_causal:  # without an order nothing is forgotten
            value = value if mask is None else value * mask[..., None, None]
            state = torch.einsum("blhn,blhd->bhnd", key, value)
            return torch.einsum("blhn,bhnd->blhd", query, state)
        heads = value.shape[2]
        # Every head with queries and keys of its own: heads become rows
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        log_decay = log_decay.transpose(1, 2).flatten(0, 1)[..., None]
        output = decayed_attention(query, key, value[:, :, None], log_decay)
        return output[:, :, 0].unflatten(0, (-1, heads)).transpose(1, 2)


class StepLinearAttention(UnitLinearAttention):
    """The recurrence of Mamba-2 with heads of its own: q and k as they are, and the step as the weight of a write."""

    def mix(self, query, key, value, *, step, log_decay, mask, is_causal) -> Tensor:
        return self.read(query, key, (value * step[..., None]).to(value.dtype), log_decay, mask, is_causal)


class GatedSoftmaxAttention(GatedMixer):
    """Softmax attention with RoPE, by `scaled_dot_product_attention`, with the same convolution, norm and gate."""

    uses_step = False

    def mix(self, query, key, value, *, step, log_decay, mask, is_causal) -> Tensor:
        length = query.shape[1]
        query, key = (rotated(x, self.config.rope_parameters["rope_theta"]) for x in (query, key))
        allowed = None
        if mask is not None:
            allowed = mask[:, None, None, :].expand(-1, 1, length, -1)
            # A token of padding sees itself: no row of the softmax is empty
            allowed = allowed | torch.eye(length, dtype=torch.bool, device=mask.device)
            allowed = allowed.tril() if is_causal else allowed
        output = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=allowed, is_causal=is_causal and mask is None
        )
        return output.transpose(1, 2)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of `(batch, length, heads, dim)`; angles in float32."""
    half = x.shape[-1] // 2
    rates = theta ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * rates
    cos, sin, (a, b) = angles.cos(), angles.sin(), x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class GatedDeltaNet(nn.Module):
    """
    Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464) as Transformers' Qwen3-Next has it: convolution, q and k of unit length,
    delta rule with decay, norm per head, output gate. The module and, where no kernels are installed, the recurrence in plain
    PyTorch are those of Transformers; steps start as published.
    """

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        heads, dim = config.num_attention_heads, config.head_dim
        self.net = Qwen3NextGatedDeltaNet(
            Qwen3NextConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=1,
                layer_types=["linear_attention"],
                linear_num_key_heads=heads,
                linear_num_value_heads=heads,
                linear_key_head_dim=dim,
                linear_value_head_dim=dim,
                linear_conv_kernel_dim=4,
                rms_norm_eps=config.rms_norm_eps,
            ),
            layer_idx=0,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        step_bias_(self.net.dt_bias, self.config.time_step_min, self.config.time_step_max)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        cache=None,
        layout: Layout | None = None,
        is_causal: bool = True,
        **kwargs,
    ) -> tuple[Tensor, None]:
        mask = padding_mask_of(layout, cache)
        if mask is not None:  # the module itself masks batches of several rows only
            hidden_states = hidden_states * mask[..., None]
        return self.net(hidden_states), None
