#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf demo`: let a trained model write, load it again, and report where its tokens are routed. See `gma_hf/commands/demo.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("demo", sys.argv[1:])
