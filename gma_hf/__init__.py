# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Gaussian Mixture Attention for Hugging Face Transformers.

`import gma_hf` registers the models with the Auto classes, so that `AutoModelForCausalLM.from_pretrained` loads them.
"""

__version__ = "0.1.0"

from .auto import register_auto_classes
from .configuration import GMAConfig
from .conversion import convert_to_gma, gma_layers, revert_to_softmax, supported_architectures
from .modeling import (
    GMAForCausalLM,
    GMAForMaskedLM,
    GMAForQuestionAnswering,
    GMAForSequenceClassification,
    GMAForTokenClassification,
    GMAModel,
    GMAPreTrainedModel,
    load_cache,
    save_cache,
)
from .ops import gaussian_mixture_affinity, gaussian_mixture_attention, gaussian_mixture_responsibilities
from .parallel import context_parallel


register_auto_classes()

__all__ = [
    "GMAConfig",
    "GMAForCausalLM",
    "GMAForMaskedLM",
    "GMAForQuestionAnswering",
    "GMAForSequenceClassification",
    "GMAForTokenClassification",
    "GMAModel",
    "GMAPreTrainedModel",
    "__version__",
    "context_parallel",
    "convert_to_gma",
    "gaussian_mixture_affinity",
    "gaussian_mixture_attention",
    "gaussian_mixture_responsibilities",
    "gma_layers",
    "load_cache",
    "revert_to_softmax",
    "save_cache",
    "supported_architectures",
]
