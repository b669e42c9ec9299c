# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The ways of Transformers' generation that GMA layers cannot take: refused before anything is generated."""

from transformers import GenerationConfig


class GMAGenerationMixin:
    """What generating models with GMA layers add to `GenerationMixin`. It stands before `GenerationMixin` among the bases."""

    def generate_batch(self, *args, **kwargs):
        """
        Raises:
            ValueError: always. Continuous batching keeps keys and values of all tokens in pages, and GMA layers have none.
        """
        raise ValueError(without_pages(self))

    def init_continuous_batching(self, *args, **kwargs):
        """
        Raises:
            ValueError: always, see `generate_batch`.
        """
        raise ValueError(without_pages(self))

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args, **kwargs):
        # The target model of assisted decoding marks the configuration that it hands to its assistant
        if getattr(generation_config, "is_assistant", False) and self._is_stateful:
            raise ValueError(
                f"{type(self).__name__} has GMA layers and cannot be the `assistant_model` of assisted decoding: the target model "
                "takes back tokens that the assistant has read, and the state of a GMA layer cannot forget single tokens. Use an "
                "assistant with softmax attention, or call `generate` without `assistant_model`."
            )
        super()._prepare_cache_for_generation(generation_config, *args, **kwargs)


def without_pages(model: GMAGenerationMixin) -> str:
    """Why a model cannot generate by continuous batching."""
    return (
        f"{type(model).__name__} has GMA layers that Transformers' continuous batching cannot serve (`generate_batch`, "
        "`init_continuous_batching`, `cache_implementation='paged'`, TRL's `use_transformers_paged`): it keeps keys and values of "
        "all tokens in pages, and a GMA layer keeps one state instead. Call `generate` with a batch of padded prompts, or serve the "
        "model with vLLM (docs/serving.md)."
    )
