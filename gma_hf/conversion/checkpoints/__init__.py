# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Classes of converted models: made, registered, installed, reverted."""
