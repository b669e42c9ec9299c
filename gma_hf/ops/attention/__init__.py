# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Gaussian mixture attention: the operator of the paper, its readable reference and its fast ways."""
