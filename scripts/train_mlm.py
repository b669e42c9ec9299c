#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf train-mlm`: train a masked language model. See `gma_hf/commands/train_mlm.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("train-mlm", sys.argv[1:])
