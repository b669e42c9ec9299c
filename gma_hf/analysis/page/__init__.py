# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
from .html import html_page, write_report


__all__ = ["html_page", "write_report"]
