# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention replacement: a model of Transformers becomes a GMA model, and keeps its API."""

import importlib

from .architectures import Architecture, supported_architectures
from .calibration.calibrate import CalibrationReport, LayerCalibration, calibrate
from .calibration.mixture_fitting import FittedMixtures, fit_mixtures
from .calibration.sensitivity import LayerSensitivity, choose_layers, rank_layers
from .calibration.teacher import SoftmaxCall, as_teacher
from .checkpoints.install import gma_layers
from .config import GMAConversionConfig
from .convert import convert_to_gma, revert_to_softmax
from .runtime.layer import GMAConversion


# Their modules import data set libraries, which `import gma_hf` must not import
_LAZY = {
    "GMADistillationArguments": "distillation.arguments",
    "GMADistillationTrainer": "distillation.trainer",
    "StageResult": "distillation.stages",
    "distill": "distillation.stages",
}

__all__ = [
    "Architecture",
    "CalibrationReport",
    "FittedMixtures",
    "GMAConversion",
    "GMAConversionConfig",
    "GMADistillationArguments",
    "GMADistillationTrainer",
    "LayerCalibration",
    "LayerSensitivity",
    "SoftmaxCall",
    "StageResult",
    "as_teacher",
    "calibrate",
    "choose_layers",
    "convert_to_gma",
    "distill",
    "fit_mixtures",
    "gma_layers",
    "rank_layers",
    "revert_to_softmax",
    "supported_architectures",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
