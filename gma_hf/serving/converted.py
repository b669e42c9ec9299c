# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Converted decoders in vLLM. The model is vLLM's own, with its fused projections and its tensor parallelism. In each converted
layer, the `gma` child that the layer has in Transformers replaces the attention. The remaining softmax layers use the
attention of vLLM.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ..conversion.config import GMAConversionConfig
from ..conversion.runtime.layer import GMAConversion
from ..modeling.memory_parts import LACKING_BEFORE
from ..ops.rotation.functional import Rotation
from .layer import GMASlotLayer, StatesFromConfig, configured_layout
from .sharding import shard_weights
from .slots import SlotLayout, SlotMemory
from .steps import StepGroup


class ServedConversion(nn.Module, GMASlotLayer):
    """
    Replaces the `Attention` of vLLM in one attention module.

    Args:
        attention (`nn.Module`): the attention module, which already has its child `gma`.
        layout (`SlotLayout`): the state of the layer.
        prefix (`str`): the name of the `Attention` in vLLM.
    """

    def __init__(self, attention: nn.Module, layout: SlotLayout, prefix: str):
        super().__init__()
        # Both belong to the attention module; here they are no children, which would give their weights a second name
        self.shared = (attention.gma, attention.rotary_emb)
        self.scaling = attention.scaling
        self.init_slots(layout, prefix)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """
        From queries, keys and values `(tokens, heads * dim)`, rotated as for softmax, to `(tokens, heads * value_dim)`.
        """
        conversion = self.shared[0]
        query = query.unflatten(-1, (conversion.num_heads, conversion.routing_dim))
        key = key.unflatten(-1, (conversion.num_key_value_heads, conversion.routing_dim))
        value = value.unflatten(-1, (conversion.num_key_value_heads, conversion.value_dim))
        output = value.new_zeros(value.shape[0], conversion.num_heads, conversion.value_dim)
        return self.run_step((query, key, value), output, self.attend_group).flatten(1)

    def attend_group(self, inputs: list[Tensor], group: StepGroup, memory: SlotMemory) -> Tensor:
        conversion, rotary_emb = self.shared
        query, key, value = (x.transpose(1, 2) for x in inputs)
        rotation = None
        if conversion.rotary_dim > 0:
            cos, sin = rotary_emb.cos_sin_cache[group.positions].to(query.device).chunk(2, dim=-1)
            cos, sin = (torch.cat([x, x], dim=-1) for x in (cos, sin))
            rotation = Rotation(apply_rotary_pos_emb, cos, sin)
        output, _ = conversion(
            query, key, value, group.layout, scaling=self.scaling, rotation=rotation, cache_layer=memory
        )
        return output.transpose(1, 2)


class ConvertedDecoderMixin(StatesFromConfig):
    """The part of a decoder of vLLM that a converted checkpoint needs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        conversion = GMAConversionConfig.from_dict(vllm_config.model_config.hf_config.gma)
        layout, num_ranks = configured_layout(vllm_config), get_tensor_model_parallel_world_size()
        context = vllm_config.compilation_config.static_forward_context
        for name, shapes in conversion.layers.items():
            attention = self.model.get_submodule(name)
            heads = {key: shapes[key] // num_ranks for key in ("num_heads", "num_key_value_heads")}
            attention.gma = GMAConversion(**{**conversion.layer_arguments(name), **heads})
            shard_weights(attention.gma, get_tensor_model_parallel_rank(), num_ranks)
            layer_name = attention.attn.layer_name
            del context[layer_name]
            attention.attn = ServedConversion(attention, layout, layer_name)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # Checkpoints from before there was a `memory_dilution` mean the zeros with which it was made
        lacking = {name for name, _ in self.named_parameters() if re.search(LACKING_BEFORE, name)}
        return super().load_weights(weights) | lacking


class ServedGMALlamaForCausalLM(ConvertedDecoderMixin, LlamaForCausalLM):
    """The class that vLLM loads for the architecture "GMALlamaForCausalLM"."""


class ServedGMAMistralForCausalLM(ConvertedDecoderMixin, MistralForCausalLM):
    """The class that vLLM loads for the architecture "GMAMistralForCausalLM"."""


class ServedGMAQwen2ForCausalLM(ConvertedDecoderMixin, Qwen2ForCausalLM):
    """The class that vLLM loads for the architecture "GMAQwen2ForCausalLM"."""


class ServedGMAQwen3ForCausalLM(ConvertedDecoderMixin, Qwen3ForCausalLM):
    """The class that vLLM loads for the architecture "GMAQwen3ForCausalLM"."""
