# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Exact softmax over the nearest tokens, which shares its normaliser with the memory."""
