# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The Triton kernels of the operator. Importing this package imports Triton, so `ops/attention/fused.py` imports it only when
it is needed.
"""
