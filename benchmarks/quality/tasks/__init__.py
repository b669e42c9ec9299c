# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The data that the experiments train and test on."""
