# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The classes of converted models: create, register, install, revert."""
