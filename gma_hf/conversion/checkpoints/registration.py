# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Converted models and the Auto classes. `import gma_hf` registers a placeholder for every model type of Transformers, so that
`gma_llama` is known without importing any model; the real classes are made, and registered, when one is asked for.
"""

import functools
import importlib
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .classes import TYPE_PREFIX, converted_config_class, converted_model_class, softmax_auto_classes


# Where Transformers looks for what belongs to a configuration besides models
PROCESSOR_MAPPINGS = {
    "tokenization_auto": "TOKENIZER_MAPPING",
    "image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
    "feature_extraction_auto": "FEATURE_EXTRACTOR_MAPPING",
    "processing_auto": "PROCESSOR_MAPPING",
}


class ConvertedConfigPlaceholder:
    """Stands for the configuration class of a converted model type until it is needed."""

    model_type: str

    def __new__(cls, *args, **kwargs) -> PreTrainedConfig:
        return cls.resolve()(*args, **kwargs)

    @classmethod
    def resolve(cls) -> type[PreTrainedConfig]:
        return register_converted_type(cls.model_type.removeprefix(TYPE_PREFIX))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
        return cls.resolve().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> PreTrainedConfig:
        return cls.resolve().from_pretrained(*args, **kwargs)


def register_placeholders() -> None:
    """Make the model types of converted models known; calling it again changes nothing."""
    for model_type in CONFIG_MAPPING_NAMES:
        name = TYPE_PREFIX + model_type
        if name not in CONFIG_MAPPING:
            placeholder = ConvertedConfigPlaceholder
            AutoConfig.register(name, type(placeholder.__name__, (placeholder,), {"model_type": name}))


@functools.cache
def register_converted_type(model_type: str) -> type[PreTrainedConfig]:
    """
    Register the converted classes of a model type of Transformers with the Auto classes that know the original.

    Args:
        model_type (`str`): for example "llama".

    Returns:
        `type[PreTrainedConfig]`: the converted configuration class.

    Raises:
        ValueError: if Transformers has no such model type.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{model_type!r} is no model type of the installed Transformers, so that a converted checkpoint could not be "
            "loaded again. Models with code of their own are not supported."
        )
    softmax_config_class = CONFIG_MAPPING[model_type]
    config_class = converted_config_class(softmax_config_class)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, model_class in softmax_auto_classes(softmax_config_class).items():
        converted = converted_model_class(model_class, softmax_config_class)
        getattr(transformers, auto_name).register(config_class, converted, exist_ok=True)
    for module_name, mapping_name in PROCESSOR_MAPPINGS.items():
        mapping = getattr(importlib.import_module(f"transformers.models.auto.{module_name}"), mapping_name)
        if softmax_config_class in mapping:
            mapping.register(config_class, mapping[softmax_config_class], exist_ok=True)
    return config_class
