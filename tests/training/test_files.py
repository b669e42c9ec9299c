# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import csv
import gzip
import json
import lzma

import datasets
import pytest

from gma_hf.training.errors import TrainingInputError
from gma_hf.training.files import MIN_CHARS_PER_ROW, load_files, resolve_files


pytestmark = pytest.mark.quick


# Separators at which `str.splitlines` would split, white space at ends, an empty line, Windows line ends, no last one
AWKWARD = " = Title = \n\nline\u2028separator, form\x0cfeed, next\x85line \r\n\ttab \x1c file\n \nend"


def write(path, content):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content.encode("utf-8"))
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz"])
def test_plain_text_is_kept_character_for_character(tmp_path, name):
    text = AWKWARD + ("\n".join(["word " * 50] * 100) + "\n") * 2 + AWKWARD
    rows = load_files([write(tmp_path / name, text)])
    assert "".join(rows["text"]) == text
    assert rows["document_end"][:] == [False] * (len(rows) - 1) + [True]
    # Rows end at line ends and are long, so that cutting hardly touches the tokens
    assert all(len(row) >= MIN_CHARS_PER_ROW and row.endswith("\n") for row in rows["text"][:-1])
    assert len(rows) > 2


def test_every_file_is_a_document(tmp_path):
    files = [write(tmp_path / f"{name}.txt", name) for name in "ab"]
    rows = load_files(files)
    assert list(zip(rows["text"], rows["document_end"], strict=True)) == [("a", True), ("b", True)]


def test_blank_lines_may_separate_documents(tmp_path):
    rows = load_files(
        [write(tmp_path / "a.txt", "one\ntwo\n\n \nthree\u2028still three\n")], text_documents="paragraph"
    )
    assert rows["text"][:] == ["one\ntwo", "three\u2028still three"]
    assert all(rows["document_end"])


def test_every_line_may_be_a_document(tmp_path):
    rows = load_files([write(tmp_path / "a.txt", "one\n\ntwo\u2028still two")], text_documents="line")
    assert rows["text"][:] == ["one", "two\u2028still two"]


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
def test_tables_of_every_format_load(tmp_path, compression):
    records = [{"text": "a\u2028b \n c", "label": 0}, {"text": "NA", "label": 1}]
    write(tmp_path / f"a.jsonl{compression}", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(compression, open)
    with opener(tmp_path / f"a.csv{compression}", "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(records)
    for kind in ("jsonl", "csv"):
        assert load_files([str(tmp_path / f"a.{kind}{compression}")]).to_list() == records


def test_parquet_loads(tmp_path):
    records = [{"text": "a", "label": "x"}]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    assert load_files([str(tmp_path / "a.parquet")]).to_list() == records


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    write(path, "before")
    assert load_files([str(path)])["text"][:] == ["before"]
    write(path, "and after")
    assert load_files([str(path)])["text"][:] == ["and after"]


def test_folders_and_patterns_are_expanded(tmp_path):
    (tmp_path / "sub").mkdir()
    names = [write(tmp_path / "b.txt", "b"), write(tmp_path / "sub" / "a.txt.gz", "a")]
    write(tmp_path / "notes.doc", "x")
    assert resolve_files([str(tmp_path)]) == sorted(names)
    assert resolve_files([str(tmp_path / "**" / "*.txt*")]) == sorted(names)
    assert resolve_files([names[0], str(tmp_path)]) == [names[0], names[1]]


def test_an_unknown_extension_can_be_explained(tmp_path):
    name = write(tmp_path / "module.py", "import this\n")
    with pytest.raises(TrainingInputError, match=r"unknown extension '\.py'.*\.jsonl.*--data_format"):
        load_files([name])
    assert load_files([name], data_format="text")["text"][:] == ["import this\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz", "a.jsonl.xz"])
def test_an_empty_file_is_named(tmp_path, name):
    with pytest.raises(TrainingInputError, match=rf"{name}' is empty"):
        load_files([write(tmp_path / name, "")])


def test_a_file_of_white_space_is_named(tmp_path):
    with pytest.raises(TrainingInputError, match=r"a\.txt' holds nothing but white space"):
        load_files([write(tmp_path / "a.txt", " \n\n")], text_documents="line")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TrainingInputError, match=r"No data file matches .*nowhere\.txt"):
        resolve_files([str(tmp_path / "nowhere.txt")])


def test_formats_do_not_mix(tmp_path):
    files = [write(tmp_path / "a.txt", "a"), write(tmp_path / "b.csv", "text\nb\n")]
    with pytest.raises(TrainingInputError, match="one format"):
        load_files(files)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(TrainingInputError, match=r"latin\.txt' is not UTF-8"):
        load_files([str(tmp_path / "latin.txt")])
    (tmp_path / "broken.txt.xz").write_bytes(b"no xz file")
    with pytest.raises(TrainingInputError, match=r"Cannot read .*broken\.txt\.xz"):
        load_files([str(tmp_path / "broken.txt.xz")])
    with pytest.raises(TrainingInputError, match=r"broken\.jsonl' as json"):
        load_files([write(tmp_path / "broken.jsonl", '{"text": "a"}\n{"text": \n')])
