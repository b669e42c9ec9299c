#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf analyze`: show where the mixtures of a model route tokens, as a page. See `gma_hf/commands/analyze.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("analyze", sys.argv[1:])
