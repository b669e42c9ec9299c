# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The GMA model: a pre-norm transformer whose attention is Gaussian Mixture Attention (Huang and Raza, arXiv:2606.18283).
"""

import os

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..cache_argument import CACHE_NAME, expect_known_cache, takes_cache
from ..compat import attention_implementation
from ..configuration import GMAConfig
from ..parallel.context import current_context
from ..parallel.heads import PartOfRow
from ..remote_code import LoadsAlone, expect_no_file
from .attention_gma import GMAAttention, GMARMSNorm, GMARotaryEmbedding
from .attention_softmax import GMASoftmaxAttention
from .cache_gma import GMACacheLayer, adopt_cache, expect_continuation, select_padding_mask, up_to_current
from .layout import (
    Layout,
    count_positions,
    expect_tokens,
    expect_whole_sequences,
    find_sequence_ids,
    same_sequence_mask_function,
)
from .memory_parts import LACKING_BEFORE, GMAMixture, GMAWindow
from .memory_state import NATIVE, take_over
from .short_convolution import GMAShortConvolution


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
    """One block: attention (GMA or softmax) and MLP. Each has a norm before it and a residual connection."""

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


class GMAPreTrainedModel(PartOfRow, LoadsAlone, PreTrainedModel):
    """
    The base class of all GMA models: initialises weights, and tells Transformers what GMA models support.

    Args:
        config ([`GMAConfig`]): the configuration.
        inputs (`tuple`, *optional*): further arguments of `PreTrainedModel`.
        kwargs (`dict`, *optional*): further keyword arguments of `PreTrainedModel`.
    """

    config_class = GMAConfig
    config: GMAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GMADecoderLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Assisted decoding needs a rollback, and a running sum has none
    _is_stateful = True
    # The context parallelism of PyTorch, which Transformers would use, does not pass the memory on; `gma_hf.context_parallel`
    # does
    _supports_context_parallel = False
    _keys_to_ignore_on_load_missing = [LACKING_BEFORE]
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
        """Do nothing: every folder that `save_pretrained` writes already loads with `trust_remote_code=True`."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        See [`PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: if the folder is a file.
        """
        expect_no_file(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, GMAShortConvolution):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, GMAMixture):
            module.reset_parameters(
                self.config.mean_init_std,
                self.config.variance_init,
                self.config.prior_init == "balanced",
                self.config.mean_init == "orthogonal",
            )
        elif isinstance(module, (GMAAttention, GMAWindow)):
            module.reset_parameters()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # In models that are no part of Transformers, Transformers passes over modules without parameters of their own. A GMA layer
        # may have none, and still ties queries to keys and quietens its output. Loaded weights stay: `init` leaves them alone
        super()._initialize_weights(module)


class GMAModel(GMAPreTrainedModel):
    """
    The GMA model without a head: embeddings, blocks and a final norm. The configuration makes it causal or bidirectional.

    Args:
        config ([`GMAConfig`]): the configuration.
    """

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

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Compute the hidden states of the tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): token ids. Pass either `input_ids` or
                `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, seen + length)`, *optional*): nonzero at real tokens, zero at
                padding. Padding may stand anywhere. `seen` is the number of tokens in the cache; the mask may leave these
                tokens out if no layer is softmax.
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*): positions. Where the positions
                start anew, a new packed sequence begins. By default real tokens are counted.
            cache (`Cache`, *optional*): the state to continue from, a `DynamicCache` or `StaticCache`. Before Transformers
                5.24 the name of this argument is `past_key_values`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): embeddings instead of
                token ids.
            use_cache (`bool`, *optional*): whether to return the state (causal models only); by default `config.use_cache`.
            kwargs (`dict`, *optional*): `output_hidden_states`, `output_attentions`; for packed sequences `seq_idx` of shape
                `(batch, length)` or `cu_seq_lens_q` of shape `(num_sequences + 1,)`; and arguments of attention
                implementations.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(batch, length, hidden_size)`, `cache`.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are passed, if they hold no token, if a bidirectional model gets a
                cache, or if the mask, the positions and the cache do not fit each other.
        """
        expect_known_cache(cache, kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        context = current_context()
        if context is None:  # the part of a process may have no tokens
            expect_tokens(*((input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)), cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        if context is None and "linear_attention" in self.config.layer_types:
            expect_whole_sequences()

        is_causal = kwargs.pop("is_causal", self.config.is_causal)
        if not is_causal:
            if cache is not None:
                raise ValueError("A bidirectional model has no state to continue from: do not pass a cache.")
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            adopt_cache(cache, self.config)
            if not is_tracing(inputs_embeds):
                take_over([layer for layer in cache.layers if isinstance(layer, GMACacheLayer)], self, NATIVE)
        seen_tokens = cache.get_seq_length() if cache is not None else 0

        # `generate` makes the masks of compiled decoding itself, one per type of layer
        masks = attention_mask if isinstance(attention_mask, dict) else None
        token_mask = attention_mask if masks is None else masks.get("linear_attention")
        if "linear_attention" not in self.config.layer_types and token_mask is not None and token_mask.ndim != 2:
            token_mask = None  # a mask of pairs of tokens, which softmax layers understand
        token_mask = up_to_current(token_mask, length, cache)
        padding_mask = select_padding_mask(token_mask, batch_size, length, cache)
        if context is not None:
            layout = context.layout_of(inputs_embeds, padding_mask, position_ids, cache, kwargs)
            sequence_ids = layout.sequence_ids
        else:
            sequence_ids = find_sequence_ids(
                batch_size, length, padding_mask, position_ids, kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q")
            )
            layout = Layout(batch_size, length, padding_mask, sequence_ids)
        if is_tracing(inputs_embeds):
            windows = [(self.config.window_size, self.config.num_sink_tokens)] if self.config.window_size > 0 else []
            dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
            layout.complete(windows, is_causal, dtype, inputs_embeds.device, cache is not None)
        expect_continuation(cache, position_ids, padding_mask, batch_size)
        if position_ids is None and layout.row is not None:
            position_ids = layout.row.positions(inputs_embeds.device)
            seen_tokens = layout.row.start
        elif position_ids is None:
            position_ids = count_positions(
                batch_size, length, inputs_embeds.device, token_mask, sequence_ids, seen_tokens
            )
        if layout.row is not None:
            softmax_mask = None  # softmax layers read from the layout which tokens they see
        elif masks is not None:
            softmax_mask = masks.get("full_attention")
        else:
            softmax_mask = self._softmax_mask(
                is_causal, inputs_embeds, attention_mask, position_ids, sequence_ids, cache, seen_tokens
            )

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
                attention_mask=softmax_mask if decoder_layer.layer_type == "full_attention" else None,
                position_embeddings=position_embeddings.get(decoder_layer.layer_type),
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                use_cache=use_cache,
                layout=layout,
                is_causal=is_causal,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def _softmax_mask(
        self,
        is_causal: bool,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        sequence_ids: torch.Tensor | None,
        cache: Cache | None,
        seen_tokens: int | torch.Tensor,
    ) -> torch.Tensor | None:
        """The mask of the softmax layers, in the form that their attention implementation needs."""
        if "full_attention" not in self.config.layer_types:
            return None
        if attention_mask is not None and attention_mask.ndim == 2 and isinstance(seen_tokens, int):
            expected = seen_tokens + inputs_embeds.shape[1]
            if attention_mask.shape[1] < expected:
                raise ValueError(
                    f"The attention mask covers {attention_mask.shape[1]} tokens, but softmax layers read the "
                    f"{seen_tokens} cached tokens again: it must cover them as well, {expected} tokens in all. Put the mask of the "
                    "cached tokens in front."
                )
        # As positional arguments, because versions of Transformers have different names for the cache
        arguments, others = (self.config, inputs_embeds, attention_mask), {}
        # Flash attention takes packed sequences from the positions or from `cu_seq_lens_q`, the others from their mask
        if sequence_ids is not None and "flash" not in attention_implementation(self.config):
            if seen_tokens > 0:
                raise ValueError(
                    "Softmax layers cannot go on from a cache with several packed sequences per row. Pass one sequence per row, or "
                    "start with a new cache."
                )
            others["and_mask_function"] = same_sequence_mask_function(sequence_ids)
        if is_causal:
            position_ids = None if others else position_ids
            return create_causal_mask(*arguments, cache, position_ids=position_ids, **others)
        return create_bidirectional_mask(*arguments, **others)

    def _check_positions(self, position_ids: torch.Tensor, length: int, seen_tokens: int | torch.Tensor):
        """Refuse positions beyond the learned ones. On a GPU the index error would not name the cause."""
        maximum = self.config.max_position_embeddings
        last_position = None
        if not is_tracing(position_ids) and position_ids.device.type == "cpu" and position_ids.numel() > 0:
            last_position = int(position_ids.max())
            if int(position_ids.min()) < 0:
                raise ValueError(f"Positions begin at 0, got {int(position_ids.min())} in `position_ids`.")
        elif isinstance(seen_tokens, int) and position_ids.shape[0] == 1:
            last_position = seen_tokens + length - 1
        if last_position is not None and last_position >= maximum:
            raise ValueError(
                f"The sequence reaches position {last_position}, but the model learned only {maximum} positions "
                f"(`max_position_embeddings`). Shorten the input, or use a model with `position_embedding_type` 'rope' or "
                "'none', which has no such bound."
            )


__all__ = ["GMADecoderLayer", "GMAModel", "GMAPreTrainedModel"]
