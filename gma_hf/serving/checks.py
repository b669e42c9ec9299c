# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks and settings at the start of vLLM, before it loads weights and takes requests."""

from packaging.version import Version
from transformers import PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from .. import __version__
from ..configuration import GMAConfig
from .layouts import model_layout
from .plugin import MODELS


TESTED_VLLM = "0.32.0"

logger = init_logger(__name__)


def warn_of_other_version(installed: str) -> None:
    """Log a line if the installed vLLM is not the tested version, because its interfaces change with every release."""
    if Version(installed).base_version != TESTED_VLLM:
        logger.warning(
            "gma_hf %s was tested with vLLM %s, but vLLM %s is installed. Compare some answers with `generate` before you "
            "rely on it, or install the tested version.",
            __version__,
            TESTED_VLLM,
            installed,
        )


class ServedModelChecks(VerifyAndUpdateConfig):
    """vLLM calls both methods for the architectures that gma_hf serves."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config = model_config.hf_config
        check_model(config, model_config)
        if getattr(config, "gma", None):
            say_which_layers_are_converted(config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check_options(vllm_config)
        cache_config, model_config = vllm_config.cache_config, vllm_config.model_config
        if cache_config.enable_prefix_caching:
            cache_config.enable_prefix_caching = False
            logger.info("Prefix caching is off: the state of a GMA layer is a running sum over one request.")
        if not model_config.enforce_eager:
            model_config.enforce_eager = True
            logger.info("GMA models run without torch.compile and without CUDA graphs (enforce_eager=True).")


class TransformersWayChecks(VerifyAndUpdateConfig):
    """
    vLLM calls this before it would run a model through Transformers. This way has no states and would give wrong answers.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config = model_config.hf_config
        if isinstance(config, GMAConfig) or getattr(config, "gma", None):
            raise ValueError(
                "vLLM cannot run a GMA model through Transformers (`model_impl='transformers'`): that way keeps no states. "
                "Leave the option out."
            )


class GMAModelArchConfigConvertor(ModelArchConfigConvertorBase):
    """vLLM reads numbers of a configuration from this class first, so models that are not served are refused here."""

    def __init__(self, hf_config: PreTrainedConfig, *args, **kwargs):
        check_architecture(hf_config)
        super().__init__(hf_config, *args, **kwargs)

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        # Learned positions end, others do not: a `--max-model-len` beyond `max_position_embeddings`, which stays the default,
        # is compared with this attribute
        config = self.hf_text_config
        if isinstance(config, GMAConfig) and config.position_embedding_type != "learned":
            config.model_max_length = 2**31 - 1
            return config.max_position_embeddings, "max_position_embeddings"
        return super().derive_max_model_len_and_key()


def check_architecture(config: PreTrainedConfig) -> None:
    """
    Check that gma_hf serves the model, and that no later gma_hf has saved it.

    Raises:
        ValueError: if not.
    """
    saved_by = getattr(config, "gma_hf_version", None)
    if saved_by is not None and Version(saved_by) > Version(__version__):
        raise ValueError(
            f"The folder was saved by gma_hf {saved_by}, but {__version__} is installed, which may not know all of its "
            "options. Install that version or a later one."
        )
    refused = [name for name in config.architectures or [config.model_type] if name not in MODELS]
    if refused:
        raise ValueError(
            f"gma_hf does not serve {', '.join(refused)} on vLLM. It serves {', '.join(MODELS)}. Run this model with Transformers."
        )
    if getattr(config, "is_causal", True) is False:
        raise ValueError(
            "A bidirectional GMA model generates nothing: vLLM serves those with `is_causal=True`. Run this model with "
            "Transformers."
        )


def say_which_layers_are_converted(config: PreTrainedConfig) -> None:
    """
    Set the layer types of a converted model. vLLM would give no states to a model whose layer types are all
    "full_attention".
    """
    if not getattr(config, "layer_types", None):
        return
    converted = {int(name.split(".")[1]) for name in config.gma["layers"]}
    config.layer_types = [
        "linear_attention" if idx in converted else kind for idx, kind in enumerate(config.layer_types)
    ]
    if "sliding_attention" not in config.layer_types and hasattr(config, "max_window_layers"):
        # Where kinds of layers are mixed, vLLM reads here whether some of them slide
        config.max_window_layers = config.num_hidden_layers


def check_model(config: PreTrainedConfig, model_config: ModelConfig) -> None:
    """
    Check that a model, and the use of it, can be served.

    Raises:
        ValueError: if not.
    """
    if model_config.runner_type != "generate":
        raise ValueError(
            f"GMA models on vLLM generate text; `runner={model_config.runner_type!r}` is not supported. Leave it out."
        )
    if isinstance(config, GMAConfig) and config.position_embedding_type == "learned":
        if model_config.max_model_len > config.max_position_embeddings:
            raise ValueError(
                f"`max_model_len` is {model_config.max_model_len}, but the model learned only "
                f"{config.max_position_embeddings} positions (`max_position_embeddings`). Choose a smaller `--max-model-len`."
            )
    quantization = model_config.quantization or getattr(config, "quantization_config", None)
    if quantization is not None:
        raise ValueError(
            f"Quantized weights ({quantization}) are not supported for GMA models. Leave it out, and choose "
            "`--dtype bfloat16` to save memory."
        )
    if getattr(config, "gma", None):
        model_layout(config, model_config.dtype)


def check_options(vllm_config: VllmConfig) -> None:
    """
    Check that GMA layers can follow the options of vLLM.

    Raises:
        ValueError: for an option that they cannot follow.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    config = vllm_config.model_config.hf_config
    num_ranks = parallel.tensor_parallel_size
    sizes = {
        name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    for name, size in sizes.items():
        if size % num_ranks != 0:
            raise ValueError(
                f"`tensor_parallel_size` ({num_ranks}) must divide `{name}` ({size}): heads of a GMA model are not split."
            )
    unsupported = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "speculative decoding (a running sum cannot give tokens back)": vllm_config.speculative_config is not None,
        "LoRA adapters (merge them into the weights)": vllm_config.lora_config is not None,
        "transfer of caches between engines": vllm_config.kv_transfer_config is not None,
        f"`mamba_ssm_cache_dtype={cache.mamba_ssm_cache_dtype!r}` (states are float32 always)": (
            cache.mamba_ssm_cache_dtype not in ("auto", "float32")
        ),
    }
    for name, is_asked in unsupported.items():
        if is_asked:
            raise ValueError(f"GMA models on vLLM do not support {name}. Leave it out.")
