# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels or plain PyTorch, for what a block computes beside the operator: by the rules of the operator's backends."""

import logging
import os

import torch

from .dispatch import ENVIRONMENT_VARIABLE


logger = logging.getLogger(__name__)
_EXPLAINED: set[str] = set()  # messages that have been logged


def prefers_kernels(what: str, on_gpu: bool, reason: str | None) -> bool:
    """
    Whether a call goes to the fused kernels.

    Args:
        what (`str`): what is computed, for messages.
        on_gpu (`bool`): whether its tensors are on a GPU.
        reason (`str`, *optional*): why the kernels cannot run the call, or `None` if they can.

    Returns:
        `bool`: on GPUs, and wherever the environment asks for the kernels, whether they can run; else `False`.

    Raises:
        `ValueError`: if the environment asks for kernels that cannot run.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name != "triton" and (name != "auto" or not on_gpu):
        return False
    if reason is None:
        return True
    if name == "triton":
        raise ValueError(f"Backend 'triton' cannot run this {what}: {reason} Unset {ENVIRONMENT_VARIABLE}.")
    message = f"The fused kernels cannot run this {what}: {reason} Plain PyTorch does."
    if message not in _EXPLAINED and not torch.compiler.is_compiling():
        _EXPLAINED.add(message)
        logger.info(message)
    return False
