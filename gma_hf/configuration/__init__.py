# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
from .configuration_gma import GMA_PRESETS, GMAConfig


__all__ = ["GMA_PRESETS", "GMAConfig"]
