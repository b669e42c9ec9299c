# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Rivals that stand in the place of a block's GMA.

In the block of the GMA paper: linear attention with the feature maps elu(x) + 1 (Katharopoulos et al., 2020, arXiv:2006.16236)
and the positive orthogonal random features of the Performer (Choromanski et al., 2021, arXiv:2009.14794), and Linformer (Wang et
al., 2020, arXiv:2006.04768). In the gated block, with everything that GMA has there (short convolution with SiLU, a learned step
with decay as in Mamba-2, a norm per head, an output gate): linear attention, the recurrence of Mamba-2, softmax.

To add a mixer, write a subclass with one method, `features` or `mix`, and an entry in `mixers.MIXERS`.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.utils import is_tracing

from benchmarks.rivals.recurrences import decayed_attention, linear_attention, short_convolution, step_bias_
from benchmarks.rivals.recurrences import padding_mask_of as real_tokens
from gma_hf import GMAConfig
from gma_hf.cache_argument import takes_cache
from gma_hf.configuration.configuration_gma import GMA_PRESETS
from gma_hf.modeling.attention_gma import GMAAttention, GMARMSNorm


class Projected(nn.Module):
    """Projections to heads and back; it takes what GMA layers take but caches and packed sequences."""

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(config.hidden_size, width, bias=config.attention_bias) for _ in range(3)
        )
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def reset_parameters(self) -> None:
        """Draw what is neither a linear map nor a norm."""

    def attend(self, query, key, value, mask: Tensor | None, is_causal: bool) -> Tensor:
        """What the heads read, `[batch, heads, length, head_dim]`; `mask` `[batch, 1, length, 1]` is true at real tokens."""
        raise NotImplementedError

    @takes_cache
    def forward(self, hidden_states, cache=None, layout=None, is_causal: bool = True, **kwargs):
        mask = real_tokens(layout, cache)
        states = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if mask is None else mask[:, None, :, None]
        output = self.attend(*(x.transpose(1, 2) for x in states), mask, is_causal)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


class EluAttention(Projected):
    """Linear attention with phi(x) = elu(x) + 1; other maps are subclasses."""

    eps = 1e-6

    def features(self, x: Tensor, is_query: bool, mask: Tensor | None) -> Tensor:
        # elu(x) + 1 with less rounding: exp(x) is small where x is negative, and 1 + x is not
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    def attend(self, query, key, value, mask, is_causal) -> Tensor:
        key = self.features(key, False, mask)
        key = key if mask is None else key.masked_fill(~mask, 0)
        return linear_attention(self.features(query, True, mask), key, value, is_causal, self.eps)


class PerformerAttention(EluAttention):
    """
    FAVOR+: phi(x) = exp(w.x - |x|^2 / 2) with x scaled by dim^(-1/4), whose products estimate the softmax kernel; the rows w
    of `projection` are orthogonal in blocks, as long as Gaussian vectors are. One projection for all heads of a layer, as
    many features as the configuration has components.

    Exponents are stabilised by their maximum, per token for queries and over all keys for keys, as in the original code:
    both cancel in the normalised read. That code also adds 1e-4 to the features. Here only the queries' get it: added to
    the keys' it would make the past depend, slightly, on the maximum over future keys.
    """

    eps = 1e-30

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.register_buffer("projection", torch.empty(config.num_components, config.head_dim))

    def reset_parameters(self) -> None:
        num_features, dim = self.projection.shape
        factors = torch.linalg.qr(torch.randn(-(-num_features // dim), dim, dim))
        # With the signs of R's diagonal the rotation is uniform; Q alone prefers some directions to their opposites
        rotations = factors.Q * factors.R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        directions = rotations.flatten(0, 1)[:num_features]
        self.projection.copy_(directions * torch.randn(num_features, dim).norm(dim=-1, keepdim=True))

    def features(self, x: Tensor, is_query: bool, mask: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
            exponents = x @ self.projection.to(x.dtype).T - 0.5 * x.square().sum(dim=-1, keepdim=True)
            if is_query:
                return (exponents - exponents.amax(dim=-1, keepdim=True).detach()).exp() + 1e-4
            if mask is not None:
                exponents = exponents.masked_fill(~mask, torch.finfo(x.dtype).min)
            return (exponents - exponents.amax(dim=(-2, -1), keepdim=True).detach()).exp()


class LinformerAttention(Projected):
    """
    o = softmax(q (E k)^T / sqrt(d)) E v, for encoders. E, `[num_components, positions]`, serves the keys and the values of all
    heads of a layer (the paper's key-value sharing); it ends at `max_position_embeddings`.
    """

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.shorten = nn.Parameter(torch.empty(config.num_components, config.max_position_embeddings))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.shorten.normal_(std=self.shorten.shape[0] ** -0.5)

    def attend(self, query, key, value, mask, is_causal) -> Tensor:
        if is_causal:
            raise ValueError("Linformer mixes all positions: use it in encoders (`is_causal=False`).")
        if mask is not None:
            if not is_tracing(mask) and bool((mask[:, :, 1:] & ~mask[:, :, :-1]).any()):
                raise ValueError(
                    "Padding stands to the left of tokens, but Linformer maps positions in the row: pad on the right."
                )
            key, value = key * mask.to(key.dtype), value * mask.to(value.dtype)
        shorten = self.shorten[:, : key.shape[2]].to(key.dtype)
        return F.scaled_dot_product_attention(query, shorten @ key, shorten @ value)


class GatedMixer(nn.Module):
    """The gated block around `mix`; starts of the block (tied queries and keys, scaled output) are as in the package."""

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
        self.o_norm = GMARMSNorm(config.head_dim, config.head_norm_eps or config.rms_norm_eps)
        if self.uses_step:
            self.dt_proj = nn.Linear(config.hidden_size, heads, bias=False)
            # "bias" in the names keeps the Trainer's weight decay away from them, as it should
            self.dt_bias = nn.Parameter(torch.empty(heads))
            self.A_log_bias = nn.Parameter(torch.empty(heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config, bound = self.config, self.conv_weight.shape[1] ** -0.5
        self.conv_weight.uniform_(-bound, bound)
        if self.uses_step:
            step_bias_(self.dt_bias, config.time_step_min, config.time_step_max)
            self.A_log_bias.uniform_(*config.decay_rate_range).log_()

    @torch.no_grad()
    def finish_initialization(self) -> None:
        """The quiet start of a block, behind the draws."""
        config = self.config
        if config.tie_qk_init:
            self.k_proj.weight.copy_(self.q_proj.weight)
        if config.scale_output_init:
            self.o_proj.weight.mul_((2 * config.num_hidden_layers) ** -0.5)

    def mix(self, query, key, value, *, step, log_decay, mask, is_causal) -> Tensor:
        """
        What the heads read.

        Args:
            query, key, value (`Tensor` of shape `(batch, length, heads, head_dim)`): after convolution and SiLU.
            step, log_decay (`Tensor` of shape `(batch, length, heads)`): not negative, and not positive; zero at padding.
                `None` if the class does not use them.
            mask (`Tensor` of shape `(batch, length)`, *optional*): true at real tokens.
            is_causal (`bool`): whether token i sees j <= i only.

        Returns:
            `Tensor` of shape `(batch, length, heads, head_dim)`.
        """
        raise NotImplementedError

    @takes_cache
    def forward(self, hidden_states, cache=None, layout=None, is_causal: bool = True, **kwargs):
        mask = real_tokens(layout, cache)
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
            return torch.einsum("blhn,bhnd->blhd", query, torch.einsum("blhn,blhd->bhnd", key, value))
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
            # A token of padding sees itself: no row of the softmax is empty
            allowed = mask[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=mask.device)
            allowed = allowed.tril() if is_causal else allowed
        states = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(*states, attn_mask=allowed, is_causal=is_causal and mask is None)
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
    delta rule with decay, norm per head, output gate. Transformers computes it by flash-linear-attention where that is
    installed, and otherwise in plain PyTorch; steps start as published.
    """

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        heads, dim = config.num_attention_heads, config.head_dim
        sizes = {"linear_num_key_heads": heads, "linear_num_value_heads": heads, "linear_conv_kernel_dim": 4}
        sizes |= {"linear_key_head_dim": dim, "linear_value_head_dim": dim, "rms_norm_eps": config.rms_norm_eps}
        sizes |= {"hidden_size": config.hidden_size, "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
        self.net = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**sizes), layer_idx=0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        step_bias_(self.net.dt_bias, self.config.time_step_min, self.config.time_step_max)

    @torch.no_grad()
    def finish_initialization(self) -> None:
        if self.config.scale_output_init:
            self.net.out_proj.weight.mul_((2 * self.config.num_hidden_layers) ** -0.5)

    @takes_cache
    def forward(self, hidden_states, cache=None, layout=None, is_causal: bool = True, **kwargs):
        mask = real_tokens(layout, cache)
        if mask is not None:  # the module itself masks batches of several rows only
            hidden_states = hidden_states * mask[..., None]
        return self.net(hidden_states), None


class AlternatingGMA(GMAAttention):
    """The gated block's GMA in layers 0, 2, ... and the correlated block's in layers 1, 3, ..., all with the quiet start."""

    def __init__(self, config: GMAConfig, layer_idx: int):
        own, correlated = copy.copy(config), GMA_PRESETS["correlated"]
        for name in correlated:
            setattr(
                own,
                name,
                correlated[name] if layer_idx % 2 else GMA_PRESETS["gated"].get(name, getattr(GMAConfig, name)),
            )
        own.scale_output_init = True
        super().__init__(own, layer_idx)

    @torch.no_grad()
    def finish_initialization(self) -> None:
        self.reset_parameters()  # again: the linear maps were drawn behind it
        own = self.config
        self.mixture_norm.reset_parameters(own.mean_init_std, own.variance_init, own.prior_init == "balanced")
