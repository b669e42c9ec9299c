# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Rotations undone in a Triton kernel."""
