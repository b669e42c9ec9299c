# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What several commands have in common: how trainings start and end, and how models are converted."""
