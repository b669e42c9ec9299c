# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Rivals that stand in the place of a layer's memory. Everything around the memory is the package's GMA layer: projections and, in the
gated block, short convolution, learned steps with decay, a norm per head and an output gate.

In the block of the GMA paper: linear attention with the feature maps elu(x) + 1 (Katharopoulos et al., 2020, arXiv:2006.16236)
and the positive orthogonal random features of the Performer (Choromanski et al., 2021, arXiv:2009.14794), and Linformer (Wang et
al., 2020, arXiv:2006.04768). In the gated block: linear attention, the recurrence of Mamba-2, softmax.

To add a rival, write a subclass of `Memory` with the method `read`, and an entry in `mixers.MIXERS`.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.utils import is_tracing

from benchmarks.rivals.recurrences import decayed_attention, linear_attention, padding_mask_of, step_bias_
from gma_hf import GMAConfig
from gma_hf.cache_argument import takes_cache
from gma_hf.configuration.configuration_gma import GMA_PRESETS
from gma_hf.modeling.attention_gma import GMAAttention


class Memory(nn.Module):
    """What the heads of a GMA layer read, where a rival is its memory; it takes no caches and no packed sequences."""

    def __init__(self, config: GMAConfig):
        super().__init__()

    def read(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, step, log_decay
    ) -> Tensor:
        """
        Args:
            query, key, value (`Tensor` of shape `(batch, heads, length, head_dim)`): as the layer makes them.
            mask (`Tensor` of shape `(batch, 1, length, 1)`, *optional*): true at real tokens.
            causal (`bool`): whether token i sees j <= i only.
            step, log_decay (`Tensor` of shape `(batch, heads, length)`, *optional*): not negative, and not positive.
        """
        raise NotImplementedError

    def forward(
        self, mixture, window, query, key, value, *, layout=None, causal=True, write_weight=None, log_decay=None,
        decay_rate=None, output_history=False, **kwargs,
    ) -> tuple[Tensor, None, None]:  # fmt: skip
        mask = padding_mask_of(layout, output_history)
        if decay_rate is not None:
            log_decay = write_weight * decay_rate
        if mask is not None:  # padding neither writes nor forgets
            log_decay = None if log_decay is None else log_decay * mask[:, None]
            mask = mask[:, None, :, None]
            value = value * mask
        return self.read(query, key, value, mask, causal, write_weight, log_decay), None, None


class EluMemory(Memory):
    """Linear attention with phi(x) = elu(x) + 1; other maps are subclasses."""

    eps = 1e-6

    def features(self, x: Tensor, is_query: bool, mask: Tensor | None) -> Tensor:
        # elu(x) + 1 with less rounding: exp(x) is small where x is negative, and 1 + x is not
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    def read(self, query, key, value, mask, causal, step, log_decay) -> Tensor:
        key = self.features(key, False, mask)
        key = key if mask is None else key.masked_fill(~mask, 0)
        return linear_attention(self.features(query, True, mask), key, value, causal, self.eps)


class PerformerMemory(EluMemory):
    """
    FAVOR+: phi(x) = exp(w.x - |x|^2 / 2) with x scaled by dim^(-1/4), whose products estimate the softmax kernel; the rows w
    of `projection` are orthogonal in blocks, as long as Gaussian vectors are. One projection for all heads of a layer, as
    many features as the configuration has components.

    Exponents are stabilised by their maximum, per token for queries and over all keys for keys, as in the original code:
    both cancel in the normalised read. That code also adds 1e-4 to the features. Here only the queries' get it: added to
    the keys' it would make the past depend, slightly, on the maximum over future keys.
    """

    eps = 1e-30

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        count, dim = config.num_components, config.head_dim
        factors = torch.linalg.qr(torch.randn(-(-count // dim), dim, dim))
        # With the signs of R's diagonal the rotation is uniform; Q alone prefers some directions to their opposites
        rotations = factors.Q * factors.R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        lengths = torch.randn(count, dim).norm(dim=-1, keepdim=True)
        self.register_buffer("projection", rotations.flatten(0, 1)[:count] * lengths)

    def features(self, x: Tensor, is_query: bool, mask: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25
            exponents = x @ self.projection.to(x.dtype).T - 0.5 * x.square().sum(dim=-1, keepdim=True)
            if is_query:
                return (exponents - exponents.amax(dim=-1, keepdim=True).detach()).exp() + 1e-4
            if mask is not None:
                exponents = exponents.masked_fill(~mask, torch.finfo(x.dtype).min)
            return (exponents - exponents.amax(dim=(-2, -1), keepdim=True).detach()).exp()


class LinformerMemory(Memory):
    """
    o = softmax(q (E k)^T / sqrt(d)) E v, for encoders. E, `[num_components, positions]`, serves the keys and the values of all
    heads of a layer (the paper's key-value sharing); it ends at `max_position_embeddings`.
    """

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        shape = (config.num_components, config.max_position_embeddings)
        self.shorten = nn.Parameter(torch.randn(shape) * config.num_components**-0.5)

    def read(self, query, key, value, mask, causal, step, log_decay) -> Tensor:
        if causal:
            raise ValueError("Linformer mixes all positions: use it in encoders (`is_causal=False`).")
        if mask is not None:
            if not is_tracing(mask) and bool((mask[:, :, 1:] & ~mask[:, :, :-1]).any()):
                raise ValueError(
                    "Padding stands to the left of tokens, but Linformer maps positions in the row: pad on the right."
                )
            key = key * mask
        shorten = self.shorten[:, : key.shape[2]].to(key.dtype)
        return F.scaled_dot_product_attention(query, shorten @ key, shorten @ value)


class StepLinearMemory(Memory):
    """The recurrence of Mamba-2 with heads of its own: q and k as they are, and the step as the weight of a write."""

    def read(self, query, key, value, mask, causal, step, log_decay) -> Tensor:
        return self.decayed(query, key, (value * step[..., None]).to(value.dtype), causal, log_decay)

    @staticmethod
    def decayed(query, key, value, causal, log_decay) -> Tensor:
        """S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t; without an order nothing is forgotten."""
        if not causal:
            return query @ (key.transpose(-1, -2) @ value)
        # Every head with queries and keys of its own: heads become rows
        query, key, rows = (x.flatten(0, 1) for x in (query, key, value))
        output = decayed_attention(query, key, rows[:, :, None], log_decay.flatten(0, 1)[..., None])
        return output[:, :, 0].unflatten(0, value.shape[:2])


class UnitLinearMemory(StepLinearMemory):
    """Linear attention with queries and keys of unit length."""

    def read(self, query, key, value, mask, causal, step, log_decay) -> Tensor:
        query, key = (F.normalize(x.float(), dim=-1).to(value.dtype) for x in (query, key))
        return self.decayed(query, key, value, causal, log_decay)


class SoftmaxMemory(Memory):
    """Softmax attention by `scaled_dot_product_attention`; the layer rotates queries and keys."""

    def read(self, query, key, value, mask, causal, step, log_decay) -> Tensor:
        allowed = None
        if mask is not None:
            # A token of padding sees itself: no row of the softmax is empty
            allowed = mask.transpose(-1, -2) | torch.eye(key.shape[2], dtype=torch.bool, device=mask.device)
            allowed = allowed.tril() if causal else allowed
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=causal and mask is None)


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
        if self.config.scale_output_init:
            self.net.out_proj.weight.mul_((2 * self.config.num_hidden_layers) ** -0.5)

    @takes_cache
    def forward(self, hidden_states, cache=None, layout=None, **kwargs):
        mask = padding_mask_of(layout, cache is not None)
        if mask is not None:  # the module itself masks batches of several rows only
            hidden_states = hidden_states * mask[..., None]
        return self.net(hidden_states), None


class AlternatingGMA(GMAAttention):
    """The gated block's GMA in layers 0, 2, ... and the correlated block's in layers 1, 3, ..., all with the quiet start."""

    def __init__(self, config: GMAConfig, layer_idx: int):
        own, correlated = copy.copy(config), GMA_PRESETS["correlated"]
        gated = {name: GMA_PRESETS["gated"].get(name, getattr(GMAConfig, name)) for name in correlated}
        for name, value in (correlated if layer_idx % 2 else gated).items():
            setattr(own, name, value)
        own.scale_output_init = True
        super().__init__(own, layer_idx)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        own = self.config
        self.mixture_norm.reset_parameters(own.mean_init_std, own.variance_init, own.prior_init == "balanced")
