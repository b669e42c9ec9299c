# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Context parallelism: one sequence over several processes. Layers find what they need of other processes in the `row` of their
layout.
"""

from .collectives import ProcessLostError
from .context import ContextParallel, context_parallel, current_context


__all__ = ["ContextParallel", "ProcessLostError", "context_parallel", "current_context"]
