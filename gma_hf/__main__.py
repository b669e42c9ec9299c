# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`python -m gma_hf` is the command `gma-hf`."""

from gma_hf_command import main


if __name__ == "__main__":
    main()
