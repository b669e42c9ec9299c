# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
from .cache_gma import GMACacheLayer, StaticGMACacheLayer, adopt_cache
from .heads_gma import (
    GMAForCausalLM,
    GMAForMaskedLM,
    GMAForQuestionAnswering,
    GMAForSequenceClassification,
    GMAForTokenClassification,
)
from .layout import Layout
from .memory import GMAMemory
from .memory_parts import GMAMixture, GMAWindow
from .memory_state import MemoryState
from .modeling_gma import GMAModel, GMAPreTrainedModel
from .saved_cache import load_cache, save_cache
from .short_convolution import GMAShortConvolution


GMAWindowHistory = MemoryState  # its name in version 0.1

__all__ = [
    "GMACacheLayer",
    "GMAForCausalLM",
    "GMAForMaskedLM",
    "GMAForQuestionAnswering",
    "GMAForSequenceClassification",
    "GMAForTokenClassification",
    "GMAMemory",
    "GMAMixture",
    "GMAModel",
    "GMAPreTrainedModel",
    "GMAShortConvolution",
    "GMAWindow",
    "GMAWindowHistory",
    "Layout",
    "MemoryState",
    "StaticGMACacheLayer",
    "adopt_cache",
    "load_cache",
    "save_cache",
]
