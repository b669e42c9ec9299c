# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Text that is read during the training. It is not written to a disk, so it may be larger than the disk.

The functions of `packing` cut the blocks, so a stream has the blocks of loaded data, in the same order. The number of rows
is not known before the end. So the run needs a number of steps, a new tokenizer learns from the first rows, and the first
rows are held out if there is no validation data.
"""

import logging
from collections.abc import Iterator

from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from ..arguments import CausalLanguageModelingArguments
from ..errors import TrainingInputError
from ..files import TEXT_FEATURES, resolve_files, stream_files
from .packing import cut_into_blocks, tokenize_rows
from .tokenization import separator_id


logger = logging.getLogger(__name__)

HELD_OUT_ROWS = 500
TOKENIZER_ROWS = 20_000
SHUFFLED_BLOCKS = 1000


def stream_text_splits(
    arguments: CausalLanguageModelingArguments, max_steps: int
) -> dict[str, IterableDataset | Dataset]:
    """
    Open the text of every split for language modelling, without loading it.

    Args:
        arguments (`CausalLanguageModelingArguments`): a data set of the Hub, or local files.
        max_steps (`int`): number of steps of the run.

    Returns:
        `dict`: `train` as a stream, `validation` and perhaps `test` in memory, all with the columns `text` and
        `document_end`.

    Raises:
        TrainingInputError: without a number of steps; if a data set, split or column is missing, or there is no text.
    """
    if max_steps < 1:
        raise TrainingInputError("With --streaming the length of the data is not known: give --max_steps as well.")
    splits: dict[str, IterableDataset | Dataset] = {
        split: _text_rows(rows, split, arguments) for split, rows in _open(arguments).items()
    }
    for split in ("validation", "test"):
        if split in splits:
            splits[split] = _in_memory(splits[split], split)
    if "validation" not in splits:
        stream = splits["train"]
        splits["validation"] = _in_memory(stream.take(HELD_OUT_ROWS), "train")
        splits["train"] = stream.skip(HELD_OUT_ROWS)
        logger.info("No validation data given: the first %d rows are held out for it.", len(splits["validation"]))
    if next(iter(splits["train"]), None) is None:
        raise TrainingInputError(
            f"The training data has no text beyond the first {HELD_OUT_ROWS} rows, which are held out for validation. Give "
            "--validation_file, or train without --streaming."
        )
    return splits


def stream_blocks(
    rows: IterableDataset, tokenizer: PreTrainedTokenizerBase, arguments: CausalLanguageModelingArguments
) -> IterableDataset:
    """
    Tokenize documents, and pack them into blocks while they are read, see `packing`.

    Args:
        rows (`IterableDataset`): columns `text` and `document_end`. The rows of a document follow each other.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        arguments (`CausalLanguageModelingArguments`): the size of the blocks, their largest number, and whether documents are
            isolated.

    Returns:
        `IterableDataset`: a stream with the columns of the blocks. Each iteration reads the text anew.
    """
    tokenized = rows.map(tokenize_rows, batched=True, remove_columns=["text"], fn_kwargs={"tokenizer": tokenizer})
    blocks = IterableDataset.from_generator(
        cut_into_blocks,
        gen_kwargs={
            "tokenized": tokenized,
            "separator_id": separator_id(tokenizer),
            "block_size": arguments.block_size,
            "stride": arguments.block_size,
            "isolate_documents": arguments.isolate_documents,
            "keep_last": False,
        },
    )
    return blocks if arguments.max_train_samples is None else blocks.take(arguments.max_train_samples)


def _open(arguments: CausalLanguageModelingArguments) -> dict[str, IterableDataset]:
    """The rows of every split that the arguments name."""
    if arguments.dataset_name is None:
        return {
            split: stream_files(resolve_files(patterns), arguments.data_format, arguments.text_documents)
            for split in ("train", "validation", "test")
            if (patterns := getattr(arguments, f"{split}_file")) is not None
        }
    name, config = arguments.dataset_name, arguments.dataset_config_name
    try:
        known = get_dataset_split_names(name, config)
        wanted = {split: getattr(arguments, f"{split}_split") for split in ("train", "validation", "test")}
        if wanted["train"] not in known:
            raise TrainingInputError(
                f"{name!r} has no split {wanted['train']!r}, only {', '.join(known)}. Choose one with --train_split."
            )
        return {
            split: load_dataset(name, config, split=part, streaming=True)
            for split, part in wanted.items()
            if part in known
        }
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise TrainingInputError(f"Cannot find the data set {name!r}: {error}") from error
    except ConnectionError as error:
        raise TrainingInputError(f"Cannot reach the hub for {name!r}: {error}") from error


def _text_rows(rows: IterableDataset, split: str, arguments: CausalLanguageModelingArguments) -> IterableDataset:
    """Reduce a stream to the columns `text` and `document_end`, without empty documents."""
    if rows.features == TEXT_FEATURES:
        return rows
    first = next(iter(rows), None)
    if first is None:
        raise TrainingInputError(f"The {split} data is empty: it has no rows.")
    column, document_end = arguments.text_column, arguments.rows_are_documents
    if column not in first:
        raise TrainingInputError(
            f"The {split} data has no column {column!r}. Its columns are {', '.join(map(repr, first))}. Choose one with "
            "--text_column."
        )
    if not isinstance(first[column], str | None):
        raise TrainingInputError(
            f"The column {column!r} of the {split} data holds {type(first[column]).__name__}, not text. Choose another with "
            "--text_column."
        )

    def texts() -> Iterator[dict]:
        for row in rows:
            text = row[column]
            if not document_end or (text is not None and text.strip()):
                yield {"text": text or "", "document_end": document_end}

    return IterableDataset.from_generator(texts, features=TEXT_FEATURES)


def _in_memory(rows: IterableDataset, split: str) -> Dataset:
    found = list(rows)
    if not found:
        raise TrainingInputError(f"The {split} data has no text. Give a file with text in it.")
    found[-1]["document_end"] = True
    return Dataset.from_list(found, features=TEXT_FEATURES)
