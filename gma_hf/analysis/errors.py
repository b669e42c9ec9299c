# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors of the analysis, which its script prints as one message instead of a traceback."""


class AnalysisError(ValueError):
    """The model, the tokenizer or the text cannot be analysed; the message says what to change."""
