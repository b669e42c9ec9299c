# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Distillation: a converted model learns from its original."""
