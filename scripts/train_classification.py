#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf train-classification`: train or fine-tune a text classifier. See `gma_hf/commands/train_classification.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("train-classification", sys.argv[1:])
