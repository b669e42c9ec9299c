# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of the operator. Importing this package imports Triton; `ops.triton` does so when it is needed."""
