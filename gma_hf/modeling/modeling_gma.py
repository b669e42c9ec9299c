# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The GMA models: a pre-norm transformer whose attention is Gaussian Mixture Attention (Huang and Raza, arXiv:2606.18283).
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration import GMAConfig
from .cache_gma import adopt_cache
from .mixture import GMAMixture
from .packing import count_positions, find_sequence_ids, same_sequence_mask_function, select_padding_mask
from .short_convolution import GMAShortConvolution


logger = logging.get_logger(__name__)


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
    """
    Cosines and sines of RoPE for states of dimension `dim`: routing states and softmax heads may differ in theirs.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: GMAConfig, dim: int):
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
        config: GMAConfig, device: torch.device | None = None, seq_len: int | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

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
    """Gaussian Mixture Attention: tokens write to, and read from, the components of a mixture (gma.md, sections 1, 2)."""

    def __init__(self, config: GMAConfig, layer_idx: int):
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
            num_heads, config.num_components, self.routing_dim, config.variance_floor, config.read_eps
        )

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
        if config.use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=False)
        self.o_norm = None
        if config.use_output_gate or not config.normalize_read:
            self.o_norm = GMARMSNorm(self.head_dim, config.rms_norm_eps)

    def reset_parameters(self):
        config = self.config
        if config.use_write_weight or config.use_decay:
            # softplus(dt_bias) is log-uniform in [time_step_min, time_step_max], as in Mamba-2
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
            init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))
        if config.use_decay:
            rate = torch.empty_like(self.A_log_bias, dtype=torch.float32).uniform_(*config.decay_rate_range)
            init.copy_(self.A_log_bias, rate.log())

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        sequence_ids: torch.Tensor | None = None,
        is_causal: bool = True,
        output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        cache_layer = past_key_values.layers[self.layer_idx] if past_key_values is not None else None

        # 1. Queries and keys, the points that are routed, and values
        query_states = self.q_proj(hidden_states)
        key_states = self.k_proj(hidden_states)
        value_states = self.v_proj(hidden_states)
        conv_history = None
        if self.conv is not None:
            mixed_states, conv_history = self.conv(
                torch.cat([query_states, key_states, value_states], dim=-1),
                causal=is_causal,
                padding_mask=attention_mask,
                sequence_ids=sequence_ids,
                history=cache_layer.conv_history if cache_layer is not None else None,
            )
            query_states, key_states, value_states = mixed_states.split(self.projection_sizes, dim=-1)
        query_states = query_states.view(*input_shape, -1, self.routing_dim).transpose(1, 2)
        key_states = key_states.view(*input_shape, -1, self.routing_dim).transpose(1, 2)
        value_states = value_states.view(*input_shape, -1, self.head_dim).transpose(1, 2)
        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)

        # 2. How much each token writes, and how much of the past it keeps
        write_weight, log_decay = self.write_and_forget(hidden_states, attention_mask)

        # 3. Write and read
        recurrence = {
            "causal": is_causal,
            "write_weight": write_weight,
            "log_decay": log_decay,
            "sequence_ids": sequence_ids,
            "normalize": self.config.normalize_read,
        }
        attn_weights = None
        if output_attentions:
            if cache_layer is not None and cache_layer.state is not None:
                raise ValueError(
                    "`output_attentions=True` needs all tokens at once: a GMA state no longer knows the single tokens "
                    "it was built from. Run without a cache (`use_cache=False`)."
                )
            attn_weights = self.mixture_norm.affinity(query_states, key_states, **recurrence)
        attn_output = self.mixture_norm(
            query_states,
            key_states,
            value_states,
            initial_state=cache_layer.state if cache_layer is not None else None,
            output_final_state=cache_layer is not None,
            **recurrence,
        )
        if cache_layer is not None:
            attn_output, state = attn_output
            cache_layer.update(state, conv_history, input_shape[1])

        # 4. Norm per head, gate, output projection
        attn_output = attn_output.transpose(1, 2)
        if self.o_norm is not None:
            attn_output = self.o_norm(attn_output)
        attn_output = attn_output.reshape(*input_shape, -1)
        if self.config.use_output_gate:
            attn_output = attn_output * nn.functional.silu(self.g_proj(hidden_states))
        return self.o_proj(attn_output), attn_weights

    def write_and_forget(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The write weights w_t and log decays log a_t, `(batch, heads or 1, length)`; padding neither writes nor forgets."""
        write_weight = log_decay = None
        if self.config.use_write_weight or self.config.use_decay:
            step = nn.functional.softplus(self.dt_proj(hidden_states).float() + self.dt_bias.float()).transpose(1, 2)
            if padding_mask is not None:
                step = step * padding_mask[:, None]
            if self.config.use_write_weight:
                write_weight = step
            if self.config.use_decay:
                log_decay = -self.A_log_bias.float().exp()[:, None] * step
        if write_weight is None and padding_mask is not None:
            write_weight = padding_mask[:, None].to(torch.float32)
        return write_weight, log_decay


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """From (batch, num_key_value_heads, length, head_dim) to (batch, num_attention_heads, length, head_dim)."""
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    key_states = repeat_kv(key, module.num_key_value_groups)
    value_states = repeat_kv(value, module.num_key_value_groups)
    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value_states)
    return attn_output.transpose(1, 2).contiguous(), attn_weights


class GMASoftmaxAttention(nn.Module):
    """Softmax attention, the `"full_attention"` layers of hybrids."""

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal

        query_size, key_value_size = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        sequence_ids: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_attentions=True` is not possible with `attn_implementation={self.config._attn_implementation!r}`, "
                "which never forms the softmax layers' weights. Load the model with `attn_implementation='eager'`, or call "
                "`model.set_attn_implementation('eager')`."
            )
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


ATTENTION_CLASSES = {"linear_attention": GMAAttention, "full_attention": GMASoftmaxAttention}


class GMAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GMAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class GMADecoderLayer(GradientCheckpointingLayer):
    """One block: attention (GMA or softmax) and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: GMAConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.self_attn = ATTENTION_CLASSES[self.layer_type](config, layer_idx)
        self.mlp = GMAMLP(config)
        self.input_layernorm = GMARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GMARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attn_output)
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states


class GMAPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what Transformers needs to know about every GMA model."""

    config_class = GMAConfig
    config: GMAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GMADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # A running sum cannot be rolled back, as assisted decoding would need
    _is_stateful = True
    _can_record_outputs = {
        "hidden_states": GMADecoderLayer,
        "attentions": [GMAAttention, GMASoftmaxAttention],
    }

    def __init__(self, config: GMAConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        # `from_pretrained(folder, num_hidden_layers=4)` changes a configuration after its own validation
        config.validate_architecture()

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: every folder that `save_pretrained` writes already loads with `trust_remote_code=True`."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, GMAShortConvolution):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, GMAMixture):
            module.reset_parameters(
                self.config.mean_init_std, self.config.variance_init, self.config.prior_init == "balanced"
            )
        elif isinstance(module, GMAAttention):
            module.reset_parameters()


class GMAModel(GMAPreTrainedModel):
    """Embeddings, blocks and final norm; causal or bidirectional as the configuration says."""

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # Which layers rotate, and vectors of which dimension they rotate
        self.rotary_embs = nn.ModuleDict()
        if config.position_embedding_type == "rope":
            if "full_attention" in config.layer_types:
                self.rotary_embs["full_attention"] = GMARotaryEmbedding(config, config.head_dim)
            if "linear_attention" in config.layer_types and config.rope_on_routing:
                self.rotary_embs["linear_attention"] = GMARotaryEmbedding(config, config.routing_dim)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([GMADecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = GMARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): tokens; or give `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, seen + length)`, *optional*): nonzero at real tokens. Padding
                may stand anywhere.
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*): positions; where they start
                anew, a new packed sequence begins. By default real tokens are counted.
            past_key_values (`Cache`, *optional*): state to go on from; a `DynamicCache` or `StaticCache`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): instead of tokens.
            use_cache (`bool`, *optional*): return the state (causal models).
            kwargs: `output_hidden_states`, `output_attentions`; `seq_idx` `(batch, length)` or `cu_seq_lens_q`
                `(num_sequences + 1,)` for packed sequences; and what attention implementations take.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(batch, length, hidden_size)`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, length = inputs_embeds.shape[:2]

        is_causal = kwargs.pop("is_causal", self.config.is_causal)
        if not is_causal:
            if past_key_values is not None:
                raise ValueError("A bidirectional model has no state to go on from: do not pass `past_key_values`.")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            adopt_cache(past_key_values, self.config)
        seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0

        # `generate` makes the masks of compiled decoding itself, one per type of layer
        masks = attention_mask if isinstance(attention_mask, dict) else None
        token_mask = attention_mask if masks is None else masks.get("linear_attention")
        if "linear_attention" not in self.config.layer_types and token_mask is not None and token_mask.ndim != 2:
            token_mask = None  # a mask of pairs of tokens, which softmax layers understand
        padding_mask = select_padding_mask(token_mask, length)
        sequence_ids = find_sequence_ids(
            batch_size, length, padding_mask, position_ids, kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q")
        )
        if position_ids is None:
            position_ids = count_positions(
                batch_size, length, inputs_embeds.device, token_mask, sequence_ids, seen_tokens
            )
        if masks is not None:
            softmax_mask = masks.get("full_attention")
        else:
            softmax_mask = self._softmax_mask(
                is_causal, inputs_embeds, attention_mask, position_ids, sequence_ids, past_key_values
            )
        masks = {"linear_attention": padding_mask, "full_attention": softmax_mask}

        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            self._check_positions(position_ids, length, seen_tokens)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        hidden_states = self.dropout(hidden_states)
        position_embeddings = {
            layer_type: rotary_emb(hidden_states, position_ids) for layer_type, rotary_emb in self.rotary_embs.items()
        }
        kwargs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions) or False

        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[decoder_layer.layer_type],
                position_embeddings=position_embeddings.get(decoder_layer.layer_type),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                sequence_ids=sequence_ids,
                is_causal=is_causal,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _softmax_mask(
        self,
        is_causal: bool,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        sequence_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """The mask of the softmax layers, in the form that their attention implementation wants."""
        if "full_attention" not in self.config.layer_types:
            return None
        seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.ndim == 2 and isinstance(seen_tokens, int):
            expected = seen_tokens + inputs_embeds.shape[1]
            if attention_mask.shape[1] < expected:
                raise ValueError(
                    f"The attention mask covers {attention_mask.shape[1]} tokens, but softmax layers read the "
                    f"{seen_tokens} cached tokens again: it must cover them as well, {expected} tokens in all."
                )
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        # Flash attention takes packed sequences from the positions or from `cu_seq_lens_q`, the others from their mask
        if sequence_ids is not None and "flash" not in self.config._attn_implementation:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError("Softmax layers cannot go on from a cache with several packed sequences per row.")
            arguments["and_mask_function"] = same_sequence_mask_function(sequence_ids)
        if is_causal:
            return create_causal_mask(
                **arguments, position_ids=None if "and_mask_function" in arguments else position_ids
            )
        return create_bidirectional_mask(**arguments)

    def _check_positions(self, position_ids: torch.Tensor, length: int, seen_tokens: int | torch.Tensor):
        """Learned positions end somewhere; an index error on a GPU would not say so."""
        maximum = self.config.max_position_embeddings
        last_position = None
        if not is_tracing(position_ids) and position_ids.device.type == "cpu" and position_ids.numel() > 0:
            last_position = int(position_ids.max())
        elif isinstance(seen_tokens, int) and position_ids.shape[0] == 1:
            last_position = seen_tokens + length - 1
        if last_position is not None and last_position >= maximum:
            raise ValueError(
                f"The sequence reaches position {last_position}, but the model learned only {maximum} positions "
                f"(`max_position_embeddings`). Shorten the input, or use a model with `position_embedding_type` 'rope' or "
                "'none', which has no such bound."
            )


class GMAForCausalLM(GMAPreTrainedModel, GenerationMixin):
    """GMA language model: a causal `GMAModel` and a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "GMAForCausalLM needs `is_causal=True` in its configuration: a bidirectional model would see the tokens it "
                "is to predict. Use GMAForMaskedLM for a bidirectional one."
            )
        self.model = GMAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # `generate` asks the cache for its length before the first forward pass
        if isinstance(model_kwargs.get("past_key_values"), Cache):
            adopt_cache(model_kwargs["past_key_values"], self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to predict, shifted inside; -100 is
                ignored.
            logits_to_keep (`int` or `torch.Tensor`): compute logits for the last so many positions only (0: all), or for
                these positions.
            For the others see [`GMAModel.forward`].

        Returns:
            `CausalLMOutputWithPast`: `loss`, `logits` of shape `(batch, kept length, vocab_size)`, `past_key_values`.

        ```python
        >>> import gma_hf
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> tokenizer = AutoTokenizer.from_pretrained(folder)
        >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
        ```
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, slice_indices, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GMAForMaskedLM(GMAPreTrainedModel):
    """GMA masked language model: a bidirectional `GMAModel` and a head that predicts the masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        if config.is_causal:
            logger.warning(
                "GMAForMaskedLM was given a causal configuration: masked tokens are predicted from what precedes them only. "
                "Use `GMAConfig(is_causal=False)` for a bidirectional model."
            )
        self.model = GMAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): tokens to predict, in place; -100 is ignored.
            For the others see [`GMAModel.forward`].

        Returns:
            `MaskedLMOutput`: `loss`, `logits` of shape `(batch, length, vocab_size)`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class GMAForSequenceClassification(GenericForSequenceClassification, GMAPreTrainedModel):
    """
    GMA sequence classifier. A causal model pools the last real token, a bidirectional one the mean of the real tokens.
    """

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): classes (or numbers, or rows of 0 and 1, as
                `config.problem_type` says).
            For the others see [`GMAModel.forward`].

        Returns:
            `SequenceClassifierOutputWithPast`: `loss`, `logits` of shape `(batch, num_labels)`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        pooled_states = self.pool(hidden_states, self._real_tokens(hidden_states, input_ids, attention_mask))
        pooled_logits = self.score(self.dropout(pooled_states))

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=pooled_logits, labels=labels, pooled_logits=pooled_logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def pool(self, hidden_states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """`(batch, length, hidden_size)` and real tokens `(batch, length)` to `(batch, hidden_size)`."""
        if self.config.is_causal:
            index = torch.arange(is_real.shape[1], device=is_real.device)
            last_real_token = (index * is_real).argmax(dim=1)
            return hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), last_real_token]
        # In float32: a sum over thousands of tokens outgrows 16 bits
        is_real = is_real[..., None].to(torch.float32)
        return ((hidden_states * is_real).sum(dim=1) / is_real.sum(dim=1).clamp(min=1)).to(hidden_states.dtype)

    def _real_tokens(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Which tokens count: those of the attention mask or, without one, those that are not the padding token."""
        batch_size, length = hidden_states.shape[:2]
        if attention_mask is not None:
            return (attention_mask[:, attention_mask.shape[1] - length :] != 0).to(hidden_states.device)
        if input_ids is not None and self.config.pad_token_id is not None:
            return (input_ids != self.config.pad_token_id).to(hidden_states.device)
        if batch_size > 1:
            logger.warning_once(
                f"{self.__class__.__name__} got a batch without `attention_mask` and cannot tell padding from tokens: all "
                "are taken for real. Pass the `attention_mask` that the tokenizer returns."
            )
        return torch.ones(batch_size, length, dtype=torch.bool, device=hidden_states.device)


class GMAForTokenClassification(GenericForTokenClassification, GMAPreTrainedModel):
    """GMA token classifier: a label per token."""


class GMAForQuestionAnswering(GenericForQuestionAnswering, GMAPreTrainedModel):
    """GMA extractive question answering: the first and last token of the answer."""


__all__ = [
    "GMAForCausalLM",
    "GMAForMaskedLM",
    "GMAForQuestionAnswering",
    "GMAForSequenceClassification",
    "GMAForTokenClassification",
    "GMAModel",
    "GMAPreTrainedModel",
]
