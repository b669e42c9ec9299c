# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The chunked backend in plain PyTorch. The equations are in `attention`."""

from . import attention


__all__ = ["attention"]
