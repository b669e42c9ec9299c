# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What is refused or changed when vLLM starts, before it loads a weight."""

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig


logger = init_logger(__name__)


class ServedModelChecks(VerifyAndUpdateConfig):
    """vLLM calls both methods for the architectures under which they are registered."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        pass

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        cache_config, model_config = vllm_config.cache_config, vllm_config.model_config
        if cache_config.enable_prefix_caching:
            cache_config.enable_prefix_caching = False
            logger.info("Prefix caching is off: the state of a GMA layer is a running sum over one request.")
        if not model_config.enforce_eager:
            model_config.enforce_eager = True
            logger.info("GMA models run without torch.compile and CUDA graphs (enforce_eager=True).")
