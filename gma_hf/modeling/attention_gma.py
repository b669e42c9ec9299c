# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Gaussian Mixture Attention, the attention of a block, and the rotary positions of its queries and keys."""

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..cache_argument import takes_cache
from .layout import Layout
from .memory import NO_AFFINITY_BEHIND_CACHE, GMAMemory
from .memory_parts import GMAMixture, GMAWindow
from .memory_state import KeptValues
from .short_convolution import GMAShortConvolution


if TYPE_CHECKING:
    from ..configuration import GMAConfig


# A token first writes a twentieth of the difference: a memory that writes everything at once drowns what it holds
DELTA_BIAS_INIT = -3.0


class GMARMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GMARotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE for states of dimension `dim`. Routing states and softmax heads may differ in it."""

    inv_freq: torch.Tensor

    def __init__(self, config: "GMAConfig", dim: int):
        super().__init__()
        # The functions of Transformers read the dimension from the configuration
        self.config = copy.copy(config)
        self.config.head_dim = dim
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(self.config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: "GMAConfig", device: torch.device | None = None, seq_len: int | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def _apply(self, fn, recurse=True):
        # A cast of the model (`.to(torch.bfloat16)`) would round the frequencies
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            cast = getattr(self, name)
            if cast.dtype != buffer.dtype:
                setattr(self, name, buffer.to(cast.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Angles in float32: bfloat16 cannot tell position 1000 from 1001
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotates half the hidden dims of the input."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys `(batch, heads, length, dim)` by the angles `(batch, length, dim)`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


class GMAAttention(nn.Module):
    """
    Gaussian Mixture Attention through the components of a mixture. With a window, tokens see the nearest tokens exactly.
    """

    def __init__(self, config: "GMAConfig", layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.routing_dim = config.routing_dim
        num_heads, num_key_value_heads = config.num_attention_heads, config.num_key_value_heads

        self.q_proj = nn.Linear(config.hidden_size, num_heads * self.routing_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, num_key_value_heads * self.routing_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, num_key_value_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        self.mixture_norm = GMAMixture(
            num_heads,
            config.num_components,
            self.routing_dim,
            config.variance_floor,
            config.read_eps,
            correlate=config.correlate,
        )
        if config.use_qk_norm:
            self.q_norm = GMARMSNorm(self.routing_dim, config.rms_norm_eps)
            self.k_norm = GMARMSNorm(self.routing_dim, config.rms_norm_eps)
        self.window_norm = None
        if config.window_size > 0:
            self.window_norm = GMAWindow(num_heads, self.routing_dim, config.window_size, config.num_sink_tokens)

        self.memory = GMAMemory()

        self.conv = None
        if config.conv_kernel_size > 0:
            self.projection_sizes = [proj.out_features for proj in (self.q_proj, self.k_proj, self.v_proj)]
            self.conv = GMAShortConvolution(sum(self.projection_sizes), config.conv_kernel_size)
        if config.use_write_weight or config.use_decay:
            self.dt_proj = nn.Linear(config.hidden_size, num_heads, bias=False)
            self.dt_bias = nn.Parameter(torch.empty(num_heads))
        if config.use_decay:
            # Mamba-2's A_log; "bias" in the name keeps every Trainer's weight decay away from it
            self.A_log_bias = nn.Parameter(torch.empty(num_heads))
        if config.use_delta_rule:
            self.beta_proj = nn.Linear(config.hidden_size, num_heads, bias=False)
            self.beta_bias = nn.Parameter(torch.empty(num_heads))
        if config.use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=False)
        self.o_norm = None
        if config.use_output_gate or not config.normalize_read:
            eps = config.rms_norm_eps if config.head_norm_eps is None else config.head_norm_eps
            self.o_norm = GMARMSNorm(self.head_dim, eps)

    def reset_parameters(self):
        config = self.config
        if config.tie_qk_init:
            # At the start, a token has the same route as a query and as a key
            of_keys = self.k_proj.weight.unflatten(0, (-1, self.routing_dim))
            groups = config.num_attention_heads // config.num_key_value_heads
            init.copy_(self.q_proj.weight, of_keys.repeat_interleave(groups, dim=0).flatten(0, 1))
        if config.scale_output_init:
            # All layers together then add as much to the residual stream as one of them would (GPT-2)
            std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
            init.normal_(self.o_proj.weight, mean=0.0, std=std)
        if config.use_write_weight or config.use_decay:
            # softplus(dt_bias) is log-uniform in [time_step_min, time_step_max], as in Mamba-2
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
            init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))
        if config.use_decay:
            rate = torch.empty_like(self.A_log_bias, dtype=torch.float32).uniform_(*config.decay_rate_range)
            init.copy_(self.A_log_bias, rate.log())
        if config.use_delta_rule:
            init.constant_(self.beta_bias, DELTA_BIAS_INIT)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        layout: Layout | None = None,
        is_causal: bool = True,
        output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "A GMA layer takes no `attention_mask`: pass `layout=Layout(batch, length, padding_mask)`."
            )
        input_shape = hidden_states.shape[:-1]
        cache_layer = cache.layers[self.layer_idx] if cache is not None else None
        history = cache_layer.history if cache_layer is not None else None
        kept = cache_layer.kept if cache_layer is not None else None
        if output_attentions and history is not None:
            raise ValueError(NO_AFFINITY_BEHIND_CACHE)

        # 1. Queries and keys, the points that are routed, and values
        query_states = self.q_proj(hidden_states)
        key_states = self.k_proj(hidden_states)
        value_states = self.v_proj(hidden_states)
        conv_history = None
        if self.conv is not None:
            mixed_states, conv_history = self.conv(
                torch.cat([query_states, key_states, value_states], dim=-1),
                causal=is_causal,
                layout=layout,
                history=history.convolution if history is not None else None,
                output_history=cache_layer is not None,
                kept=kept,
            )
            query_states, key_states, value_states = mixed_states.split(self.projection_sizes, dim=-1)
        query_states = heads_first(query_states, self.routing_dim)
        key_states = heads_first(key_states, self.routing_dim)
        value_states = heads_first(value_states, self.head_dim)
        if self.config.use_qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)

        # 2. How much each token writes, and how much of the past it keeps
        write_weight, log_decay, decay_rate = self.write_and_forget(hidden_states, kept)
        delta_strength = None
        if self.config.use_delta_rule:
            delta_strength = (self.beta_proj(hidden_states).float() + self.beta_bias.float()).sigmoid().transpose(1, 2)

        # 3. Write and read
        normalize = self.config.normalize_read or self.window_norm is not None
        value_dtype = value_states.dtype
        # Under autocast norms and angles give float32. Softmax gets the 16 bits of the projections, and so does the mixture:
        # the fused kernels take one type
        query_states, key_states = query_states.to(value_dtype), key_states.to(value_dtype)
        if not normalize and value_dtype == torch.float16:
            # A sum over many tokens may leave the range of float16 before the norm per head scales it
            value_states = value_states.float()
        attn_output, attn_weights, history = self.memory(
            self.mixture_norm,
            self.window_norm,
            query_states,
            key_states,
            value_states,
            layout=layout,
            causal=is_causal,
            normalize=normalize,
            write_weight=write_weight,
            log_decay=log_decay,
            decay_rate=decay_rate,
            delta_strength=delta_strength,
            history=history,
            output_history=cache_layer is not None,
            output_affinity=output_attentions,
            kept=kept,
        )
        if cache_layer is not None:
            history, num_tokens = history._replace(convolution=conv_history), input_shape[1]
            is_plain = layout is None or layout.is_plain
            if layout is not None and layout.row is not None:
                history, num_tokens, is_plain = layout.row.last_history(history)
            cache_layer.advance(history, num_tokens, is_plain)

        # 4. Norm per head, gate, output projection
        # Of one token, heads may stay where they are
        attn_output = (
            attn_output if isinstance(input_shape[1], int) and input_shape[1] == 1 else attn_output.transpose(1, 2)
        )
        if self.o_norm is not None:
            attn_output = self.o_norm(attn_output)
        attn_output = attn_output.reshape(*input_shape, -1).to(value_dtype)
        if self.config.use_output_gate:
            attn_output = attn_output * nn.functional.silu(self.g_proj(hidden_states))
        return self.o_proj(attn_output), attn_weights

    def write_and_forget(
        self, hidden_states: torch.Tensor, kept: KeptValues | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        w_t and log a_t `(batch, heads, length)`. If both are learned, the rate log a_t / w_t `(heads, 1)` replaces log a_t.
        """
        if not (self.config.use_write_weight or self.config.use_decay):
            return None, None, None
        step = self.dt_proj(hidden_states).float() + self.dt_bias.float()
        # Tokens last in memory too, as in the gradient: torch.compile takes the layout of the one for the other's
        step = nn.functional.softplus(step.transpose(1, 2).contiguous())
        if not self.config.use_decay:
            return step, None, None
        rate = (KeptValues() if kept is None else kept).get("decay rate", (self.A_log_bias,), decay_rate_of)
        return (step, None, rate) if self.config.use_write_weight else (None, rate * step, None)


def decay_rate_of(A_log_bias: torch.Tensor) -> torch.Tensor:
    """The factor `(heads, 1)` between a step and log a_t."""
    return -A_log_bias.float().exp()[:, None]


def heads_first(states: torch.Tensor, dim: int) -> torch.Tensor:
    """From `(batch, length, heads * dim)` to `(batch, heads, length, dim)`."""
    batch_size, length = states.shape[:2]
    if isinstance(length, int) and length == 1:
        return states.view(batch_size, -1, 1, dim)
    return states.view(batch_size, length, -1, dim).transpose(1, 2)
