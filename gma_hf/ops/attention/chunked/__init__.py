# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The chunked way in plain PyTorch: `attention` opens with its equations."""

from . import attention


__all__ = ["attention"]
