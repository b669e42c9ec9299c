# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Local data files: which files a pattern means, which format they have, and plain text read without loss.

Every character of plain text is kept: line breaks stay in the text (so a perplexity is the perplexity of the whole text), only
`\\n` ends a line, and no other Unicode separator splits a text. `datasets.load_dataset` reads tabular formats.
"""

import glob
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .. import __version__
from .errors import TrainingInputError


FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
# A document is cut, at line ends, into rows of at least this many characters. Rows bound the memory and let the
# tokenizer work in parallel; `document_end` marks the last row of each document.
MIN_CHARS_PER_ROW = 4096
TEXT_FEATURES = Features({"text": Value("string"), "document_end": Value("bool")})


def resolve_files(patterns: list[str]) -> list[str]:
    """
    Expand files, glob patterns and folders into a list of files without repetitions.

    Args:
        patterns (`list[str]`): file names, glob patterns (`**` includes subfolders) or folders (every file with a known
            extension inside of them).

    Returns:
        `list[str]`: file names in the order of the patterns, sorted within each pattern.

    Raises:
        TrainingInputError: if a pattern matches nothing.
    """
    files: list[str] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and _extension(p) in FORMATS]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not found:
            raise TrainingInputError(
                f"No data file matches {pattern!r}. Give an existing file, a glob pattern in quotes, or a folder with "
                f"files of a known extension ({', '.join(FORMATS)}, plain or with {' or '.join(COMPRESSIONS)})."
            )
        files += sorted(str(p) for p in found)
    return list(dict.fromkeys(files))


def file_format(files: list[str], data_format: str = "auto") -> str:
    """
    The format of a list of files of one kind.

    Args:
        files (`list[str]`): file names.
        data_format (`str`): `auto` reads the extensions. Any other value is returned.

    Returns:
        `str`: `text`, `json`, `csv` or `parquet`.

    Raises:
        TrainingInputError: for an unknown extension or a mixture of formats.
    """
    if data_format != "auto":
        return data_format
    formats = {}
    for name in files:
        extension = _extension(Path(name))
        if extension not in FORMATS:
            raise TrainingInputError(
                f"{name!r} has the unknown extension {extension!r}. Known are {', '.join(FORMATS)}, plain or with "
                f"{' or '.join(COMPRESSIONS)}; for another extension say what the file holds with --data_format."
            )
        formats.setdefault(FORMATS[extension], name)
    if len(formats) > 1:
        raise TrainingInputError(
            "The files of one split must have one format, but there are "
            + " and ".join(f"{kind} ({name!r})" for kind, name in formats.items())
            + "."
        )
    return next(iter(formats))


def load_files(files: list[str], data_format: str = "auto", text_documents: str = "file") -> Dataset:
    """
    Load local files of one format as one data set.

    Args:
        files (`list[str]`): existing file names, see `resolve_files`.
        data_format (`str`): `auto`, `text`, `json`, `csv` or `parquet`.
        text_documents (`str`): a document of plain text is the whole `file`, a `paragraph` (separated by blank lines) or a
            `line`.

    Returns:
        `Dataset`: the rows; for text with the columns `text` and `document_end`.

    Raises:
        TrainingInputError: for an empty, unreadable or unknown file.
    """
    return _load(files, data_format, text_documents, streaming=False)


def stream_files(files: list[str], data_format: str = "auto", text_documents: str = "file") -> IterableDataset:
    """Like `load_files`, but the rows are read again in each iteration, and nothing is written to a cache."""
    return _load(files, data_format, text_documents, streaming=True)


def _load(files: list[str], data_format: str, text_documents: str, streaming: bool) -> Dataset | IterableDataset:
    kind = file_format(files, data_format)
    for name in files:
        _check_not_empty(name)
        if kind == "text" and not any(line.strip() for line in _lines(name)):
            raise TrainingInputError(f"{name!r} holds nothing but white space. Give a file with text in it.")
    try:
        if kind == "text":
            # Size and time of change are part of the cache's key, so an edited file is read again.
            stamps = [(Path(name).stat().st_size, Path(name).stat().st_mtime_ns) for name in files]
            return (IterableDataset if streaming else Dataset).from_generator(
                _text_rows,
                features=TEXT_FEATURES,
                gen_kwargs={"files": tuple(files), "documents": text_documents, "cache_key": (*stamps, __version__)},
            )
        # An empty cell or the word "NA" is text like any other.
        options = {"keep_default_na": False} if kind == "csv" else {}
        if kind == "csv" and _extension(Path(files[0])) == ".tsv":
            options["sep"] = "\t"
        return load_dataset(kind, data_files={"train": files}, split="train", streaming=streaming, **options)
    except ValueError as error:
        if "no data" not in str(error):
            raise
        raise TrainingInputError(f"There are no rows in {_names(files)}. Give a file with data in it.") from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise TrainingInputError(f"Cannot read {_names(files)} as {kind}: {cause}") from error


def write_json(path: Path, values: Any) -> None:
    """Write readable JSON in one step, so that an interruption leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2, default=str) + "\n", "utf-8")
    temporary.replace(path)


def _text_rows(files: tuple[str, ...], documents: str, cache_key: tuple) -> Iterator[dict]:
    """Yield rows `{"text", "document_end"}`. The joined rows of a document are the document."""
    for name in files:
        lines = _lines(name)
        if documents == "line":
            for line in lines:
                if line.strip():
                    yield {"text": line.rstrip("\n"), "document_end": True}
        elif documents == "paragraph":
            paragraph: list[str] = []
            for line in lines:
                if line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield {"text": "".join(paragraph).rstrip("\n"), "document_end": True}
                    paragraph = []
            if paragraph:
                yield {"text": "".join(paragraph).rstrip("\n"), "document_end": True}
        else:
            row, size = [], 0
            for line in lines:
                if size >= MIN_CHARS_PER_ROW:
                    yield {"text": "".join(row), "document_end": False}
                    row, size = [], 0
                row.append(line)
                size += len(line)
            if row:
                yield {"text": "".join(row), "document_end": True}


def _lines(name: str) -> Iterator[str]:
    """Yield the lines of a plain or compressed UTF-8 file, each with its line break."""
    open_file = COMPRESSIONS.get(Path(name).suffix.lower(), open)
    with open_file(name, "rb") as raw:
        # newline="\n" neither translates "\r\n" nor splits at a lone "\r".
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as text:
            try:
                yield from text
            except UnicodeDecodeError as error:
                raise TrainingInputError(f"{name!r} is not UTF-8 text: {error}. Convert the file first.") from error


def _check_not_empty(name: str) -> None:
    open_file = COMPRESSIONS.get(Path(name).suffix.lower(), open)
    try:
        with open_file(name, "rb") as file:
            empty = not file.read(1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TrainingInputError(f"Cannot read {name!r}: {error}") from error
    if empty:
        raise TrainingInputError(f"{name!r} is empty. Give a file with text in it, or leave it out.")


def _extension(path: Path) -> str:
    """The extension that gives the format: the last extension, or the extension before the compression's."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _names(files: list[str]) -> str:
    shown = ", ".join(repr(name) for name in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"
