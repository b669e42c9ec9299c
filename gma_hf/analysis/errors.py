# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors of the analysis. The command prints such an error as one message, without a traceback."""


class AnalysisError(ValueError):
    """The model, the tokenizer or the text cannot be analysed. The message says what to change."""
