# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Converted models and the Auto classes. `import gma_hf` registers a placeholder for every model type of Transformers, so that
`gma_llama` is known without importing any model; the real classes are made, and registered, when one is asked for.
"""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ...compat import config_class_of, is_known_model_type, share_processors, transformers_model_types
from .classes import TYPE_PREFIX, converted_config_class, converted_model_class, made_once, softmax_auto_classes


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
    for model_type in transformers_model_types():
        name = TYPE_PREFIX + model_type
        if not is_known_model_type(name):
            placeholder = ConvertedConfigPlaceholder
            AutoConfig.register(name, type(placeholder.__name__, (placeholder,), {"model_type": name}))


@made_once
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
    softmax_config_class = config_class_of(model_type)
    if softmax_config_class is None:
        raise ValueError(
            f"{model_type!r} is no model type of the installed Transformers, so that a converted checkpoint could not be "
            "loaded again. Models with code of their own are not supported."
        )
    config_class = converted_config_class(softmax_config_class)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, model_class in softmax_auto_classes(softmax_config_class).items():
        converted = converted_model_class(model_class, softmax_config_class)
        getattr(transformers, auto_name).register(config_class, converted, exist_ok=True)
    share_processors(config_class, softmax_config_class)
    return config_class
