#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `gma-hf publish`: check a trained model and upload it to the Hub. See `gma_hf/commands/publish.py`."""

import sys

from gma_hf_command import run_verb


if __name__ == "__main__":
    run_verb("publish", sys.argv[1:])
