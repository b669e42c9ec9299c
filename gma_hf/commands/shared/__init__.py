# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What several commands share: the start and the end of trainings, and the conversion of models."""
