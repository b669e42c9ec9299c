# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
from ..ops.window.tokens import GMAWindowHistory
from .cache_gma import GMACacheLayer, StaticGMACacheLayer, adopt_cache, load_cache, save_cache
from .heads_gma import (
    GMAForCausalLM,
    GMAForMaskedLM,
    GMAForQuestionAnswering,
    GMAForSequenceClassification,
    GMAForTokenClassification,
)
from .mixture import GMAMixture
from .modeling_gma import GMAModel, GMAPreTrainedModel
from .short_convolution import GMAShortConvolution
from .window import GMAWindow


__all__ = [
    "GMACacheLayer",
    "GMAForCausalLM",
    "GMAForMaskedLM",
    "GMAForQuestionAnswering",
    "GMAForSequenceClassification",
    "GMAForTokenClassification",
    "GMAMixture",
    "GMAModel",
    "GMAPreTrainedModel",
    "GMAShortConvolution",
    "GMAWindow",
    "GMAWindowHistory",
    "StaticGMACacheLayer",
    "adopt_cache",
    "load_cache",
    "save_cache",
]
