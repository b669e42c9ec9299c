# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The function that vLLM calls in each of its processes if gma_hf is installed."""

# Where the classes of architectures are; vLLM imports them when it needs them
MODELS = {
    "GMAForCausalLM": "gma_hf.serving.native:ServedGMAForCausalLM",
    **{
        f"GMA{name}ForCausalLM": f"gma_hf.serving.converted:ServedGMA{name}ForCausalLM"
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
    },
}


def register() -> None:
    """Register GMA models with vLLM. A second call changes nothing."""
    import vllm
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    import gma_hf  # noqa: F401 (registers the configurations with AutoConfig)

    from ..conversion.checkpoints.classes import TYPE_PREFIX
    from .checks import GMAModelArchConfigConvertor, ServedModelChecks, TransformersWayChecks, warn_of_other_version

    if "GMAForCausalLM" in MODELS_CONFIG_MAP:
        return
    warn_of_other_version(vllm.__version__)
    register_backend(MambaAttentionBackendEnum.CUSTOM, "gma_hf.serving.layer.GMASlotBackend", is_mamba=True)
    for model_type in ("gma", *(TYPE_PREFIX + name for name in CONFIG_MAPPING_NAMES)):
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = GMAModelArchConfigConvertor
    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP[architecture] = ServedModelChecks
    for architecture in ModelRegistry.get_supported_archs():
        if architecture.startswith("Transformers"):
            MODELS_CONFIG_MAP.setdefault(architecture, TransformersWayChecks)
