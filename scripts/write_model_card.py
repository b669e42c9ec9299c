#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf card`: measure a language model with confidence intervals, and write its model card. See `gma_hf/commands/card.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("card", sys.argv[1:])
