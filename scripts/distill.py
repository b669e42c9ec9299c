#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf distill`: convert a pretrained model and distil it to recover its quality. See `gma_hf/commands/distill.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("distill", sys.argv[1:])
