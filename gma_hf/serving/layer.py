# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
A GMA layer behind vLLM's interface for recurrent layers: vLLM gives each running sequence a slot and says, before every step,
which tokens belong to which sequence; the layer reads its memory from the slots and writes it back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from .slots import SlotLayout, SlotMemory
from .steps import StepGroup, group_step


@dataclass
class GMAStepMetadata:
    """What the GMA layers are told about a step, worked out once for all of them."""

    groups: list[StepGroup]


class GMAStepMetadataBuilder(AttentionMetadataBuilder[GMAStepMetadata]):
    """From vLLM's description of a step to its groups, by numbers that are on the host already."""

    # Sequences that go on by one token come first in a step, as the softmax layers of hybrids want it
    reorder_batch_threshold: int = 1

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> GMAStepMetadata:
        metadata = common_attn_metadata
        lengths = metadata.query_start_loc_cpu.diff()[: metadata.num_reqs]
        seen = metadata.seq_lens_cpu_upper_bound[: metadata.num_reqs]
        # One slot a sequence, the first of its blocks
        slots = metadata.block_table_tensor[: metadata.num_reqs, 0]
        return GMAStepMetadata(group_step(lengths.tolist(), (seen - lengths).tolist(), slots, self.device))


class GMASlotBackend(AttentionBackend):
    """Names the builder above; the layers compute their attention themselves."""

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
    What every GMA layer has in vLLM: slots, and a way to run the groups of a step through a function that knows batches.

    Call [`GMASlotLayer.init_slots`] when the layer is built.
    """

    def init_slots(self, layout: SlotLayout, prefix: str) -> None:
        """
        Announces the layer to vLLM.

        Args:
            layout (`SlotLayout`): what it remembers for one sequence.
            prefix (`str`): the layer's name in the model.
        """
        self.layout = layout
        self.prefix = prefix
        self.kv_cache = ()
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.layout)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.layout)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def run_step(
        self,
        inputs: tuple[Tensor, ...],
        output: Tensor,
        attend: Callable[[list[Tensor], StepGroup, SlotMemory], Tensor],
    ) -> Tensor:
        """
        Runs one step.

        Args:
            inputs (`tuple[torch.Tensor]` of shapes `(tokens, ...)`): what the layer needs of each token.
            output (`torch.Tensor` of shape `(tokens, ...)`): where the results go.
            attend (`Callable`): from the inputs `(rows, length, ...)` of a group, the group and its memory, which it updates,
                to the results `(rows, length, ...)`.

        Returns:
            `torch.Tensor`: `output`.
        """
        for group in self.groups(inputs[0]):
            memory = SlotMemory(self.layout, self.kv_cache, group.slots, group.is_fresh)
            rows = attend([group.take(x) for x in inputs], group, memory)
            memory.store()
            group.put(rows, output)
        return output

    def groups(self, tokens: Tensor) -> list[StepGroup]:
        """The groups of the current step. When vLLM measures memory there are none, and all tokens are one sequence."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return group_step([tokens.shape[0]], [0], None, tokens.device)
        return metadata[self.prefix].groups


def state_shapes(layout: SlotLayout) -> tuple[tuple[int, ...], ...]:
    """In the form that vLLM wants."""
    return tuple(field.shape for field in layout.fields())


def state_dtypes(layout: SlotLayout) -> tuple[torch.dtype, ...]:
    """Likewise."""
    return tuple(field.dtype for field in layout.fields())
