# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What vLLM calls in each of its processes where gma_hf is installed."""


def register() -> None:
    """Makes GMA models known to vLLM; calling it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    import gma_hf  # noqa: F401 (registers the configurations with AutoConfig)

    from .checks import ServedModelChecks

    register_backend(MambaAttentionBackendEnum.CUSTOM, "gma_hf.serving.layer.GMASlotBackend", is_mamba=True)
    ModelRegistry.register_model("GMAForCausalLM", "gma_hf.serving.native:ServedGMAForCausalLM")
    MODELS_CONFIG_MAP["GMAForCausalLM"] = ServedModelChecks
