#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf convert`: replace the softmax of a pretrained model by Gaussian mixtures. See `gma_hf/commands/convert.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("convert", sys.argv[1:])
