# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Registration with the Auto classes of Transformers."""

import transformers
from transformers import AutoConfig

from . import configuration, modeling
from .conversion.checkpoints.classes import register_placeholders
from .conversion.runtime.attention import register_attention
from .remote_code import AUTO_CLASSES


def register_auto_classes():
    """Register every GMA class with its Auto class, and what converted models need. A second call changes nothing."""
    AutoConfig.register("gma", configuration.GMAConfig, exist_ok=True)
    for auto_name, class_name in AUTO_CLASSES.items():
        if auto_name != "AutoConfig":
            auto_class = getattr(transformers, auto_name)
            auto_class.register(configuration.GMAConfig, getattr(modeling, class_name), exist_ok=True)
    register_attention()
    register_placeholders()
