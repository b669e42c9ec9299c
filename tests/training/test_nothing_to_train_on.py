# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Training on nothing is refused: files without rows, rows without text, and lengths that leave no token of a text."""

import json

import datasets
import pytest
from tokenizers.processors import TemplateProcessing

from gma_hf.training import TrainingInputError, train_tokenizer
from gma_hf.training.arguments import ClassificationArguments, LanguageModelingArguments
from gma_hf.training.text.data import load_labelled_splits, load_text_splits, tokenize_texts


pytestmark = pytest.mark.quick
WITHOUT_ROWS = {
    "list.json": "[]",
    "header.csv": "text,label\n",
    "header.tsv": "text\tlabel\n",
    "blank.jsonl": "\n\n",
}


def load(task, path):
    if task == "classification":
        return load_labelled_splits(ClassificationArguments(train_file=[str(path)]), seed=0)
    return load_text_splits(LanguageModelingArguments(train_file=[str(path)]), seed=0)


@pytest.mark.parametrize("task", ["classification", "language modelling"])
@pytest.mark.parametrize("name", [*WITHOUT_ROWS, "table.parquet"])
def test_a_file_without_rows_is_named(tmp_path, name, task):
    if name in WITHOUT_ROWS:
        (tmp_path / name).write_text(WITHOUT_ROWS[name])
    else:
        datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(str(tmp_path / name))
    with pytest.raises(TrainingInputError, match=rf"no rows in .*{name}"):
        load(task, tmp_path / name)


def test_a_label_without_a_text_is_no_example(tmp_path):
    rows = [{"text": "word", "label": "a"}, {"text": "word", "label": "b"}] * 20 + [{"text": None, "label": "a"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TrainingInputError, match="2 rows of the train data have no text in 'text'"):
        load("classification", tmp_path / "rows.jsonl")


def test_texts_that_are_all_empty_are_no_data(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + ' ,a\n"",b\n' * 20)
    with pytest.raises(TrainingInputError, match="every row of 'text' is empty"):
        load("classification", tmp_path / "rows.csv")


@pytest.mark.parametrize("length", [0, -4])
def test_a_length_must_hold_a_token(length):
    with pytest.raises(TrainingInputError, match=f"--max_length must be at least 1, got {length}"):
        ClassificationArguments(train_file=["a.csv"], max_length=length)


def test_a_length_must_hold_more_than_the_special_tokens(sentences):
    tokenizer = train_tokenizer(iter(sentences(20)), 300)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    rows = datasets.Dataset.from_dict({"text": ["the river", "the mills"], "label": [0, 1]})
    with pytest.raises(TrainingInputError, match="--max_length 2 leaves no token of a text"):
        tokenize_texts(rows, tokenizer, max_length=2, split="train")
    assert [len(ids) for ids in tokenize_texts(rows, tokenizer, max_length=3, split="train")["input_ids"]] == [3, 3]


@pytest.mark.parametrize("option", ["max_train_samples", "max_eval_samples", "preprocessing_num_workers"])
def test_numbers_of_samples_and_workers_are_positive(option):
    with pytest.raises(TrainingInputError, match=f"--{option} must be at least 1, got 0"):
        LanguageModelingArguments(train_file=["a.txt"], **{option: 0})
