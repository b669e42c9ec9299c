# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Fit mixtures to the keys and queries of the original model."""
