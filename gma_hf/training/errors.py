# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors that the training scripts print as one message instead of a traceback."""


class TrainingInputError(ValueError):
    """The user's data, files or arguments cannot be trained on; the message says what to change."""


class NonFiniteTrainingError(ArithmeticError):
    """The loss or a weight became NaN or infinite; the message names the last good checkpoint."""
