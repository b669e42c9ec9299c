# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks are scripts that import each other by plain module name; here they can be imported likewise."""

import sys
from pathlib import Path


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
