# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line `gma-hf`, one file per verb. The scripts in `scripts/` call the same functions."""
