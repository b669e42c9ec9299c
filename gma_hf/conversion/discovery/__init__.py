# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Which attention modules a model has, and which of them are converted."""
