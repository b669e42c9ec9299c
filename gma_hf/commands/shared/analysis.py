# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Load what the command needs: a model, its tokenizer, and text files. Every error says what to do."""

import gzip
import logging
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...analysis.collection import find_mixtures
from ...analysis.errors import AnalysisError
from ...training.errors import why_not_loaded


logger = logging.getLogger(__name__)

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
PIECE_CHARS = 1 << 16  # a text is tokenized in pieces of at least this many characters, cut at line ends


@dataclass
class TextFiles:
    """
    Text files that can be read.

    Args:
        paths (`list[Path]`): the files, in order.
    """

    paths: list[Path]

    @property
    def name(self) -> str:
        """The name of the files in a report."""
        names = [path.name for path in self.paths]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def pieces(self) -> Iterator[str]:
        """The texts, piece by piece, so that a large file is read only as far as needed."""
        for path in self.paths:
            yield from _pieces(path)


def read_texts(names: list[str]) -> TextFiles:
    """
    Check that text files can be read and are not empty.

    Args:
        names (`list[str]`): UTF-8 text files, plain, .gz or .xz.

    Returns:
        `TextFiles`: the files.

    Raises:
        AnalysisError: if a file is missing, unreadable or not UTF-8, or all files are empty.
    """
    files = TextFiles([Path(name).expanduser() for name in names])
    # Read the beginning of every file now, so that an error comes before the model is loaded
    beginnings = [next(_pieces(path), "") for path in files.paths]
    if not any(beginning.strip() for beginning in beginnings):
        raise AnalysisError(f"There is no text in {files.name}. Give a file with words in it.")
    return files


def load_model(
    name: str, device: str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """
    Load a model without its head, and check that it has Gaussian mixtures.

    Args:
        name (`str`): folder or Hub name.
        device (`str`, *optional*, defaults to `"cpu"`): the device to run on.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"`, or the name of a dtype of torch.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run code from the repository.

    Returns:
        `PreTrainedModel`: the model, in evaluation mode.

    Raises:
        AnalysisError: if the model cannot be loaded or has no Gaussian mixtures, or the device does not exist.
    """
    try:
        model = AutoModel.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise AnalysisError(f"Cannot load the model {name!r}: {why_not_loaded(name, error)}") from error
    find_mixtures(model)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise AnalysisError(f"Cannot run the model on the device {device!r}: {error}") from error


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer.

    Args:
        name (`str`): folder or Hub name.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run code from the repository.

    Returns:
        `PreTrainedTokenizerBase`: the tokenizer.

    Raises:
        AnalysisError: if there is no tokenizer, or the tokenizer has special tokens only.
    """
    advice = "Name the folder or hub repository of the tokenizer that the model was trained with (--tokenizer_name)."
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AnalysisError(
            f"Cannot load a tokenizer from {name!r}: {why_not_loaded(name, error)}\n{advice}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise AnalysisError(f"The tokenizer of {name!r} has no tokens but special ones. {advice}")
    return tokenizer


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of whole lines."""
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            while lines := file.readlines(PIECE_CHARS):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise AnalysisError(f"{str(path)!r} is not UTF-8 text: {error}. Convert the file first.") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise AnalysisError(f"Cannot read {str(path)!r}: {error}. Give the path of a text file.") from error
