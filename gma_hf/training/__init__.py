# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Training: data, tokenizers, the trainer and its reports. The commands combine these parts."""

from .callbacks import MixtureHealth, MixtureHealthCallback, measure_mixture_health
from .checkpoints import find_last_checkpoint
from .errors import NonFiniteTrainingError, TrainingInputError
from .text.packing import PackedCollator, PackedText, pack_documents
from .text.tokenization import train_tokenizer
from .trainer import GMATrainer, GMATrainingArguments, mixture_parameters


__all__ = [
    "GMATrainer",
    "GMATrainingArguments",
    "MixtureHealth",
    "MixtureHealthCallback",
    "NonFiniteTrainingError",
    "PackedCollator",
    "PackedText",
    "TrainingInputError",
    "find_last_checkpoint",
    "measure_mixture_health",
    "mixture_parameters",
    "pack_documents",
    "train_tokenizer",
]
