# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A GMA layer with the interface of vLLM for recurrent layers. vLLM gives each running sequence a slot and says, before every
step, which tokens belong to which sequence. The layer reads its memory from the slots and writes it back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from ..modeling.memory_state import KeptValues
from .layouts import model_layout
from .slots import SlotLayout, SlotMemory, run_step
from .steps import StepGroup, group_step


@dataclass
class GMAStepMetadata:
    """The description of a step for the GMA layers, computed once for all of them."""

    groups: list[StepGroup]


class GMAStepMetadataBuilder(AttentionMetadataBuilder[GMAStepMetadata]):
    """From the description of a step by vLLM to its groups, with numbers that are already on the host."""

    # Sequences that go on by one token come first in a step, as the softmax layers of hybrids want it
    reorder_batch_threshold: int = 1

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.packed = configured_layout(vllm_config).window_size == 0

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> GMAStepMetadata:
        metadata = common_attn_metadata
        lengths = metadata.query_start_loc_cpu.diff()[: metadata.num_reqs]
        seen = metadata.seq_lens_cpu_upper_bound[: metadata.num_reqs]
        # One slot a sequence, the first of its blocks
        slots = metadata.block_table_tensor[: metadata.num_reqs, 0]
        contexts = (seen - lengths).tolist()
        return GMAStepMetadata(group_step(lengths.tolist(), contexts, slots, self.device, self.packed))


class GMASlotBackend(AttentionBackend):
    """Names the builder above. The layers compute their attention themselves."""

    @staticmethod
    def get_name() -> str:
        return "GMA_SLOTS"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("GMA layers compute their attention themselves.")

    @staticmethod
    def get_builder_cls() -> type[GMAStepMetadataBuilder]:
        return GMAStepMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class GMASlotLayer(MambaBase):
    """
    What every GMA layer in vLLM has: slots, and a way to run the groups of a step through a function for batches. Call
    [`GMASlotLayer.init_slots`] when the layer is built.
    """

    def init_slots(self, layout: SlotLayout, prefix: str) -> None:
        """
        Register the layer with vLLM.

        Args:
            layout (`SlotLayout`): the state of the layer for one sequence.
            prefix (`str`): name of the layer in the model.
        """
        self.layout = layout
        self.prefix = prefix
        self.kv_cache = ()
        self.kept = KeptValues()
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(field.shape for field in self.layout.fields())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(field.dtype for field in self.layout.fields())

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def run_step(
        self, inputs: Sequence[Tensor], output: Tensor, attend: Callable[[list[Tensor], StepGroup, SlotMemory], Tensor]
    ) -> Tensor:
        """Run one step, see [`run_step`]. A layer only adds a function for its groups as batches."""
        return run_step(self.groups(inputs[0]), self.layout, self.kv_cache, inputs, output, attend, self.kept)

    def groups(self, tokens: Tensor) -> list[StepGroup]:
        """The groups of the current step. While vLLM measures memory there are none, and all tokens are one sequence."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return group_step([tokens.shape[0]], [0], None, tokens.device)
        return metadata[self.prefix].groups


class StatesFromConfig:
    """
    The interfaces `HasInnerState` and `IsHybrid` of vLLM. They are protocols, and as base classes they would stop the chain
    of `__init__`. A model without softmax layers is marked by the absence of such layers.
    """

    has_inner_state = True
    is_hybrid = True

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return tuple(field.shape for field in configured_layout(vllm_config).fields())

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return tuple(field.dtype for field in configured_layout(vllm_config).fields())

    @classmethod
    def get_mamba_state_copy_func(cls):
        raise NotImplementedError("The states of GMA layers are not shared between requests: prefix caching is off.")


def configured_layout(vllm_config: VllmConfig) -> SlotLayout:
    """The slots of the model of this vLLM, on one rank."""
    model_config, num_ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    return model_layout(model_config.hf_config, model_config.dtype, num_ranks)
