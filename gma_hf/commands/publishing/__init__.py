# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of `gma-hf publish`: which files belong to a published model, their checks, and the upload."""
