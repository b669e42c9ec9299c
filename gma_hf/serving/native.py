# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
[`GMAForCausalLM`] in vLLM. The blocks come from `gma_hf.modeling`, with the heads of one tensor-parallel rank, so that each
equation is computed in one place. Everything that depends on a single token (norms, MLP) runs over all tokens of a step at
once, and the attention runs by groups of sequences.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from ..cache_argument import CACHE_NAME
from ..configuration import GMAConfig
from ..modeling.attention_gma import GMAAttention, GMARMSNorm, GMARotaryEmbedding, apply_rotary_pos_emb
from ..modeling.attention_softmax import GMASoftmaxAttention
from ..modeling.memory_parts import LACKING_BEFORE
from ..modeling.modeling_gma import GMAMLP
from .layer import GMASlotLayer, StatesFromConfig
from .layouts import native_layout, rank_config
from .sharding import shard_weights
from .slots import SlotCache, SlotMemory
from .steps import StepGroup


class ServedGMAAttention(GMAAttention, GMASlotLayer):
    """[`GMAAttention`] with the heads of one rank, over the tokens of a step."""

    def __init__(self, config: GMAConfig, layer_idx: int, dtype: torch.dtype, prefix: str):
        super().__init__(config, layer_idx)
        self.init_slots(native_layout(config, dtype), prefix)

    def forward(self, hidden_states: Tensor, positions: Tensor, rotary_emb: GMARotaryEmbedding | None) -> Tensor:
        """
        From `(tokens, hidden_size)` to the part of the output, of the same shape, that comes from the heads of this rank.
        """
        inputs = (hidden_states,)
        if rotary_emb is not None:
            inputs += tuple(x[0] for x in rotary_emb(hidden_states, positions[None]))
        return self.run_step(inputs, torch.zeros_like(hidden_states), self.attend_group)

    def attend_group(self, inputs: list[Tensor], group: StepGroup, memory: SlotMemory) -> Tensor:
        hidden_states, *position_embeddings = inputs
        output, _ = GMAAttention.forward(
            self,
            hidden_states,
            layout=group.layout,
            position_embeddings=tuple(position_embeddings) or None,
            **{CACHE_NAME: SlotCache(self.layer_idx, memory)},
        )
        return output


class ServedSoftmaxAttention(GMASoftmaxAttention):
    """[`GMASoftmaxAttention`] with the attention and the paged cache of vLLM."""

    def __init__(self, config: GMAConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str):
        super().__init__(config, layer_idx)
        self.attn = Attention(
            config.num_attention_heads,
            config.head_dim,
            self.scaling,
            num_kv_heads=config.num_key_value_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: Tensor, positions: Tensor, rotary_emb: GMARotaryEmbedding | None) -> Tensor:
        """See [`ServedGMAAttention.forward`]."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if rotary_emb is not None:
            heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None] for x in (query, key))
            heads = apply_rotary_pos_emb(*heads, *rotary_emb(hidden_states, positions[None]))
            query, key = (x[0].transpose(0, 1).flatten(1) for x in heads)
        return self.o_proj(self.attn(query, key, value))


class ServedBlock(nn.Module):
    """One block. Attention and MLP each return the sum over the ranks."""

    def __init__(self, config: GMAConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        attention_prefix = f"{prefix}.self_attn"
        if self.layer_type == "linear_attention":
            dtype = vllm_config.model_config.dtype
            self.self_attn = ServedGMAAttention(config, layer_idx, dtype, attention_prefix)
        else:
            self.self_attn = ServedSoftmaxAttention(config, layer_idx, vllm_config, attention_prefix)
        self.mlp = GMAMLP(config)
        self.input_layernorm = GMARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GMARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, positions: Tensor, rotary_embs: nn.ModuleDict) -> Tensor:
        rotary_emb = rotary_embs[self.layer_type] if self.layer_type in rotary_embs else None
        output = self.self_attn(self.input_layernorm(hidden_states), positions, rotary_emb)
        hidden_states = hidden_states + tensor_model_parallel_all_reduce(output)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + tensor_model_parallel_all_reduce(output)


class ServedGMAModel(nn.Module):
    """[`GMAModel`], with the same names of weights."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: GMAConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary_embs = nn.ModuleDict()
        if config.position_embedding_type == "rope":
            if "full_attention" in config.layer_types:
                self.rotary_embs["full_attention"] = GMARotaryEmbedding(config, config.head_dim)
            if "linear_attention" in config.layer_types and config.rope_on_routing:
                self.rotary_embs["linear_attention"] = GMARotaryEmbedding(config, config.routing_dim)
        local = rank_config(config, get_tensor_model_parallel_world_size())
        self.layers = nn.ModuleList(
            [ServedBlock(local, idx, vllm_config, f"{prefix}.layers.{idx}") for idx in range(config.num_hidden_layers)]
        )
        self.norm = GMARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, self.rotary_embs)
        return self.norm(hidden_states)


class ServedGMAForCausalLM(StatesFromConfig, nn.Module):
    """The class that vLLM loads for the architecture "GMAForCausalLM"."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config: GMAConfig = vllm_config.model_config.hf_config
        self.model = ServedGMAModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        shard_weights(self.model.layers, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors=None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = AutoWeightsLoader(self).load_weights(weights)
        # Checkpoints from before there was a `memory_dilution` mean the zeros with which it was made
        return loaded | {name for name, _ in self.named_parameters() if re.search(LACKING_BEFORE, name)}
