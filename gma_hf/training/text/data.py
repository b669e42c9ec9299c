# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Training, validation and test data: load them, check them, and hold out a validation set if there is none."""

import logging

import numpy as np
from datasets import ClassLabel, Dataset, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from ..arguments import ClassificationArguments, DataArguments, LanguageModelingArguments
from ..errors import TrainingInputError
from ..files import TEXT_FEATURES, load_files, resolve_files


logger = logging.getLogger(__name__)

# From this many documents on, validation takes whole documents at random; below, the end of the text.
MIN_DOCUMENTS_TO_DRAW_FROM = 20


def load_splits(arguments: DataArguments, trust_remote_code: bool = False) -> dict[str, Dataset]:
    """
    Load the raw splits that the arguments name.

    Args:
        arguments (`DataArguments`): a data set of the Hub, or local files.
        trust_remote_code (`bool`): argument of `datasets.load_dataset` for the Hub.

    Returns:
        `dict`: `{"train": ..., "validation": ..., "test": ...}`; validation and test only if they exist.

    Raises:
        TrainingInputError: if a data set, split or file is missing, empty or of an unknown kind.
    """
    text_documents = getattr(arguments, "text_documents", "file")
    splits = {}
    if arguments.dataset_name is not None:
        loaded = _load_from_hub(arguments, trust_remote_code)
        for split in ("train", "validation", "test"):
            name = getattr(arguments, f"{split}_split")
            if name in loaded:
                splits[split] = loaded[name]
            elif split == "train":
                raise TrainingInputError(
                    f"{arguments.dataset_name!r} has no split {name!r}, only {', '.join(loaded)}. "
                    "Choose one with --train_split."
                )
    else:
        for split in ("train", "validation", "test"):
            patterns = getattr(arguments, f"{split}_file")
            if patterns is not None:
                splits[split] = load_files(resolve_files(patterns), arguments.data_format, text_documents)
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise TrainingInputError(
                f"The {split} data is empty: it has no rows. Give a file or a data set with rows."
            )
    return splits


def load_text_splits(
    arguments: LanguageModelingArguments, seed: int, trust_remote_code: bool = False
) -> dict[str, Dataset]:
    """
    Load the text of every split for language modelling.

    Args:
        arguments (`LanguageModelingArguments`): the arguments of the data.
        seed (`int`): seed for the choice of validation documents.
        trust_remote_code (`bool`): see `load_splits`.

    Returns:
        `dict[str, Dataset]`: splits `train`, `validation` and perhaps `test`, with the columns `text` and `document_end`.

    Raises:
        TrainingInputError: see `load_splits`; also for a missing text column or data without text.
    """
    splits = {
        split: _text_rows(dataset, split, arguments.text_column, arguments.rows_are_documents)
        for split, dataset in load_splits(arguments, trust_remote_code).items()
    }
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split_text(splits["train"], arguments.validation_fraction, seed)
        logger.info(
            "No validation data given: %d of %d rows of the training text are held out for it.",
            len(splits["validation"]),
            len(splits["train"]) + len(splits["validation"]),
        )
    return splits


def load_labelled_splits(
    arguments: ClassificationArguments, seed: int, trust_remote_code: bool = False
) -> tuple[dict[str, Dataset], list[str]]:
    """
    Load texts and classes of every split for classification.

    Args:
        arguments (`ClassificationArguments`): the arguments of the data.
        seed (`int`): seed for the choice of the validation set, which keeps the proportions of the classes.
        trust_remote_code (`bool`): see `load_splits`.

    Returns:
        `tuple`: the splits with the columns `text` (str) and `label` (class index), and the names of the classes in the
        order of their indices: as the data set declares them, otherwise the sorted values of the training data.

    Raises:
        TrainingInputError: see `load_splits`; also for a missing column, missing values, fewer than two classes, or classes
            that differ between the splits.
    """
    raw = load_splits(arguments, trust_remote_code)
    for split, dataset in raw.items():
        _check_column(dataset, split, arguments.text_column, "--text_column")
        _check_column(dataset, split, arguments.label_column, "--label_column")
        _check_text_type(dataset, split, arguments.text_column)
        feature = dataset.features[arguments.label_column]
        if not isinstance(feature, (ClassLabel, Value)):
            raise TrainingInputError(
                f"The column {arguments.label_column!r} of the {split} data holds {feature}, not one class a row. Choose "
                "another with --label_column."
            )
    values = {split: dataset[arguments.label_column][:] for split, dataset in raw.items()}
    for split, dataset in raw.items():
        missing, has_text = _count_texts(dataset, arguments.text_column)
        if missing:
            raise TrainingInputError(
                f"{missing} rows of the {split} data have no text in {arguments.text_column!r}. Remove the rows, or give "
                "an empty text."
            )
        if not has_text:
            raise TrainingInputError(
                f"The {split} data has no text: every row of {arguments.text_column!r} is empty. Choose another column with --text_column."
            )
        missing = sum(value is None or value == "" for value in values[split])
        if missing:
            raise TrainingInputError(
                f"{missing} rows of the {split} data have no value in {arguments.label_column!r}. Label or remove them."
            )
    label_feature = raw["train"].features[arguments.label_column]
    classes = set(values["train"])
    for split in raw:
        _check_same_classes(classes, set(values[split]), split, arguments.allow_missing_labels)
    if len(classes) < 2:
        raise TrainingInputError(
            f"The training data has only the class {next(iter(classes))!r} in {arguments.label_column!r}; "
            "classification needs two at least."
        )
    if isinstance(label_feature, ClassLabel):
        names, index = label_feature.names, {i: i for i in range(len(label_feature.names))}
    else:
        ordered = sorted(classes)
        names, index = [str(value) for value in ordered], {value: i for i, value in enumerate(ordered)}

    splits = {
        split: dataset.select_columns([arguments.text_column])
        .rename_columns({arguments.text_column: "text"} if arguments.text_column != "text" else {})
        .add_column("label", [index[value] for value in values[split]], feature=ClassLabel(names=names))
        for split, dataset in raw.items()
    }
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split_labelled(splits["train"], arguments.validation_fraction, seed)
    return splits, names


def tokenize_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str, num_proc: int | None = None
) -> Dataset:
    """
    Tokenize texts for classification, and cut them at `max_length` tokens. The number of cut texts is logged.

    Args:
        dataset (`Dataset`): columns `text` and `label`.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer, with its special tokens.
        max_length (`int`): largest number of tokens per text; the beginning is kept.
        split (`str`): name of the data in messages.
        num_proc (`int`, *optional*): number of processes that tokenize.

    Returns:
        `Dataset`: columns `input_ids`, `attention_mask` and `labels`. An empty text becomes one padding token that counts.

    Raises:
        TrainingInputError: if `max_length` leaves no token of the text.
    """
    num_special = tokenizer.num_special_tokens_to_add()
    if max_length <= num_special:
        raise TrainingInputError(
            f"--max_length {max_length} leaves no token of a text: the tokenizer adds {num_special} special tokens. Give "
            "more."
        )

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        whole = tokenizer(batch["text"], verbose=False)["input_ids"]
        is_cut = [len(row) > max_length for row in whole]
        ids = [
            tokenizer(text, truncation=True, max_length=max_length)["input_ids"] if cut else row
            for text, row, cut in zip(batch["text"], whole, is_cut, strict=True)
        ]
        ids = [row or [tokenizer.pad_token_id] for row in ids]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "is_cut": is_cut}

    tokenized = dataset.map(
        tokenize, batched=True, remove_columns=["text"], num_proc=num_proc, desc=f"Tokenizing ({split})"
    )
    num_cut = sum(tokenized["is_cut"])
    if num_cut:
        logger.warning(
            "%d of %d %s texts are longer than --max_length %d tokens; only their beginning is used.",
            num_cut,
            len(tokenized),
            split,
            max_length,
        )
    return tokenized.remove_columns("is_cut").rename_column("label", "labels")


def _load_from_hub(arguments: DataArguments, trust_remote_code: bool) -> dict[str, Dataset]:
    # `datasets` has no `trust_remote_code` from version 4 on
    options = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        return load_dataset(arguments.dataset_name, arguments.dataset_config_name, **options)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise TrainingInputError(f"Cannot find the data set {arguments.dataset_name!r}: {error}") from error
    except ValueError as error:  # an unknown or missing configuration name; the message lists the valid ones
        raise TrainingInputError(f"Cannot load the data set {arguments.dataset_name!r}: {error}") from error
    except ConnectionError as error:
        raise TrainingInputError(f"Cannot reach the hub for {arguments.dataset_name!r}: {error}") from error


def _text_rows(dataset: Dataset, split: str, column: str, rows_are_documents: bool) -> Dataset:
    """Reduce a table to the columns `text` and `document_end`."""
    if dataset.features == TEXT_FEATURES:
        return dataset
    _check_column(dataset, split, column, "--text_column")
    _check_text_type(dataset, split, column)
    dataset = dataset.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
    if rows_are_documents:
        with_text = dataset.filter(_has_text, input_columns="text", desc=f"Looking for empty documents ({split})")
        if len(with_text) < len(dataset):
            logger.warning("%d empty rows of the %s data are left out.", len(dataset) - len(with_text), split)
        dataset = with_text
    if len(dataset) == 0:
        raise TrainingInputError(
            f"The {split} data has no text: every row of {column!r} is empty. Choose another column with --text_column."
        )
    document_end = np.full(len(dataset), rows_are_documents)
    document_end[-1] = True
    return dataset.add_column("document_end", document_end.tolist())


def _count_texts(dataset: Dataset, column: str) -> tuple[int, bool]:
    """The number of rows without text, and whether any row has text; read in portions."""
    missing, has_text = 0, False
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        missing += sum(text is None for text in batch[column])
        has_text = has_text or any(map(_has_text, batch[column]))
    return missing, has_text


def _has_text(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def _split_text(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out whole documents at random, or the end of the text if there are few documents."""
    if len(dataset) < 2:
        raise TrainingInputError(
            "The training data is too small to hold out a part for validation. Give --validation_file, or more text."
        )
    num_held_out = max(1, round(fraction * len(dataset)))
    document_end = np.asarray(dataset["document_end"][:])
    document_of_row = np.cumsum(document_end) - document_end
    num_documents = int(document_of_row[-1]) + 1
    if num_documents < MIN_DOCUMENTS_TO_DRAW_FROM:
        cut = len(dataset) - num_held_out
        return dataset.select(range(cut)), dataset.select(range(cut, len(dataset)))
    order = np.random.default_rng(seed).permutation(num_documents)
    rows_per_document = np.bincount(document_of_row)[order]
    # Enough documents to reach the share of the rows, and never the last one, which stays for training
    num_drawn = min(int(np.searchsorted(np.cumsum(rows_per_document), num_held_out)) + 1, num_documents - 1)
    held_out = np.isin(document_of_row, order[:num_drawn])
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _split_labelled(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    try:
        parts = dataset.train_test_split(test_size=fraction, seed=seed, stratify_by_column="label")
    except ValueError as error:  # a class with one row only, or fewer held-out rows than classes
        raise TrainingInputError(
            f"Cannot hold out {fraction:.0%} of {len(dataset)} training rows with every class in it ({error}). "
            "Give --validation_file, or a larger --validation_fraction."
        ) from error
    return parts["train"], parts["test"]


def _check_column(dataset: Dataset, split: str, column: str, option: str) -> None:
    if column not in dataset.column_names:
        raise TrainingInputError(
            f"The {split} data has no column {column!r}. Its columns are {', '.join(map(repr, dataset.column_names))}. "
            f"Choose one with {option}."
        )


def _check_text_type(dataset: Dataset, split: str, column: str) -> None:
    feature = dataset.features[column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        raise TrainingInputError(
            f"The column {column!r} of the {split} data holds {feature}, not text. Choose another with --text_column."
        )


def _check_same_classes(train: set, other: set, split: str, allow_missing: bool) -> None:
    def listed(values: set) -> str:
        shown = ", ".join(repr(value) for value in sorted(values, key=str)[:10])
        return shown if len(values) <= 10 else f"{shown} and {len(values) - 10} more"

    unseen = other - train
    if unseen:
        raise TrainingInputError(
            f"The labels differ between the splits: the {split} data has {listed(unseen)}, which the training data "
            f"does not have ({listed(train)}). Use the same labels in every file."
        )
    if train - other and not allow_missing:
        raise TrainingInputError(
            f"The labels differ between the splits: the {split} data lacks {listed(train - other)}, which the training "
            "data has. If that is right, pass --allow_missing_labels."
        )
