# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import logging

import datasets
import pytest

from gma_hf.training.arguments import ClassificationArguments, LanguageModelingArguments
from gma_hf.training.errors import TrainingInputError
from gma_hf.training.text.data import load_labelled_splits, load_text_splits, tokenize_texts
from gma_hf.training.text.tokenization import train_tokenizer


def load_text(seed=0, **arguments):
    arguments = {name: [str(v)] if name.endswith("_file") else v for name, v in arguments.items()}
    return load_text_splits(LanguageModelingArguments(**arguments), seed)


def load_labels(**arguments):
    arguments = {name: [str(v)] if name.endswith("_file") else v for name, v in arguments.items()}
    return load_labelled_splits(ClassificationArguments(**arguments), seed=0)


@pytest.fixture
def local_hub_dataset(tmp_path, sentences):
    """A folder in the layout of a data set on the hub, with two configurations; `load_dataset` takes its path."""
    folder = tmp_path / "some_dataset"
    for config in ("small", "large"):
        for split in ("train", "validation", "test"):
            (folder / config).mkdir(parents=True, exist_ok=True)
            rows = datasets.Dataset.from_dict(
                {"text": [f"{config} {split}", "", *sentences(5)], "label": [0, 1] * 3 + [0]}
            )
            rows = rows.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
            rows.to_parquet(str(folder / config / f"{split}.parquet"))
    lines = [
        f"- config_name: {config}\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in ("train", "validation", "test")
        )
        for config in ("small", "large")
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    return str(folder)


def test_validation_is_split_off_without_losing_or_sharing_text(corpus):
    text = corpus.read_text("utf-8")
    few = load_text(train_file=corpus, validation_fraction=0.3)
    assert "".join(few["train"]["text"]) + "".join(few["validation"]["text"]) == text
    many = load_text(train_file=corpus, text_documents="paragraph", validation_fraction=0.3)
    train, validation = set(many["train"]["text"]), set(many["validation"]["text"])
    assert not train & validation
    assert train | validation == set(text.strip("\n").split("\n\n"))
    assert 0.3 <= len(validation) / 60 < 0.4  # 60 paragraphs, drawn whole


def test_the_drawn_validation_set_depends_on_the_seed_alone(corpus):
    def draw(seed):
        return load_text(seed, train_file=corpus, text_documents="line")["validation"]["text"][:]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_given_validation_and_test_files_are_used_as_they_are(tmp_path, corpus):
    for name in ("validation", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    splits = load_text(train_file=corpus, validation_file=tmp_path / "validation.txt", test_file=tmp_path / "test.txt")
    assert "".join(splits["train"]["text"]) == corpus.read_text("utf-8")
    assert [splits[name]["text"][:] for name in ("validation", "test")] == [["validation"], ["test"]]


def test_data_sets_of_the_hub_load_by_name_and_configuration(local_hub_dataset):
    splits = load_text(dataset_name=local_hub_dataset, dataset_config_name="large")
    assert splits["train"]["text"][0] == "large train"
    assert splits["test"]["text"][0] == "large test"
    assert len(splits["train"]) == 6  # the empty row is no document
    with pytest.raises(TrainingInputError, match=r"small.*large|large.*small"):
        load_text(dataset_name=local_hub_dataset, dataset_config_name="huge")
    with pytest.raises(TrainingInputError, match="no split 'dev', only train, validation, test"):
        load_text(dataset_name=local_hub_dataset, dataset_config_name="small", train_split="dev")
    with pytest.raises(TrainingInputError, match="no_such_dataset"):
        load_text(dataset_name="./no_such_dataset")


def test_rows_may_be_pieces_of_one_text(local_hub_dataset):
    splits = load_text(dataset_name=local_hub_dataset, dataset_config_name="small", rows_are_documents=False)
    assert splits["train"]["document_end"][:] == [False] * 6 + [True]
    assert splits["train"]["text"][1] == ""


def test_class_names_come_from_the_data(labelled, local_hub_dataset):
    splits, names = load_labels(train_file=labelled("train"))
    assert names == ["rural", "urban"]
    assert set(splits) == {"train", "validation"}
    assert all(text.startswith(names[label]) for text, label in zip(*splits["train"].to_dict().values(), strict=True))
    assert sorted(splits["validation"]["label"]) == [0, 1]  # 5 % of 40, every class in its proportion
    _, names = load_labels(dataset_name=local_hub_dataset, dataset_config_name="small")
    assert names == ["bad", "good"]


def test_integer_labels_are_ordered_as_numbers(tmp_path):
    rows = {"text": ["a"] * 33, "label": [2, 10, 1] * 11}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "a.parquet"))
    splits, names = load_labels(train_file=tmp_path / "a.parquet", validation_fraction=0.2)
    assert names == ["1", "2", "10"]
    assert sorted([*splits["train"]["label"], *splits["validation"]["label"]])[::11] == [0, 1, 2]


def test_labels_that_differ_between_splits_are_an_error(labelled):
    train = labelled("train", labels=("rural", "urban", "coastal"))
    with pytest.raises(TrainingInputError, match=r"validation data has 'suburban'.*'coastal', 'rural', 'urban'"):
        load_labels(train_file=train, validation_file=labelled("v", labels=("rural", "urban", "suburban")))
    fewer = labelled("test", labels=("rural", "urban"))
    with pytest.raises(TrainingInputError, match=r"test data lacks 'coastal'.*--allow_missing_labels"):
        load_labels(train_file=train, test_file=fewer)
    splits, names = load_labels(train_file=train, test_file=fewer, allow_missing_labels=True, validation_fraction=0.2)
    assert names == ["coastal", "rural", "urban"]
    assert set(splits["test"]["label"]) == {1, 2}


def test_unusable_labels_are_an_error(labelled, tmp_path):
    with pytest.raises(TrainingInputError, match="only the class 'rural'"):
        load_labels(train_file=labelled("one", labels=("rural",)))
    (tmp_path / "gap.csv").write_text("text,label\na,x\nb,\nc,y\n")
    with pytest.raises(TrainingInputError, match="1 rows of the train data have no value in 'label'"):
        load_labels(train_file=tmp_path / "gap.csv")
    with pytest.raises(TrainingInputError, match=r"Cannot hold out.*--validation_file"):
        load_labels(train_file=labelled("few", count=4))


def test_a_missing_column_lists_those_there(labelled, corpus):
    train = labelled("train")
    with pytest.raises(TrainingInputError, match=r"no column 'body'.*'text', 'label'.*--text_column"):
        load_text(train_file=train, text_column="body")
    with pytest.raises(TrainingInputError, match=r"no column 'topic'.*'text', 'label'.*--label_column"):
        load_labels(train_file=train, label_column="topic")
    with pytest.raises(TrainingInputError, match="no column 'label'"):
        load_labels(train_file=corpus)


def test_a_column_without_text_is_an_error(tmp_path):
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(TrainingInputError, match=r"'text' of the train data holds .*not text"):
        load_text(train_file=tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,n\n ,1\n,2\n")
    with pytest.raises(TrainingInputError, match="no text"):
        load_text(train_file=tmp_path / "a.csv")


def test_data_must_be_named_once(corpus):
    with pytest.raises(TrainingInputError, match="--dataset_name or --train_file"):
        LanguageModelingArguments()
    with pytest.raises(TrainingInputError, match=r"not both \(--train_file\)"):
        LanguageModelingArguments(dataset_name="x", train_file=[str(corpus)])


def test_a_text_too_small_to_split_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n")
    with pytest.raises(TrainingInputError, match="too small to hold out"):
        load_text(train_file=tmp_path / "a.txt")


def test_long_texts_to_classify_are_cut_and_counted(sentences, caplog):
    tokenizer = train_tokenizer(iter(sentences(20)), 300)
    rows = datasets.Dataset.from_dict({"text": ["the river " * 50, "the", ""], "label": [0, 1, 0]})
    with caplog.at_level(logging.WARNING, logger="gma_hf"):
        tokenized = tokenize_texts(rows, tokenizer, max_length=7, split="train")
    assert "1 of 3 train texts are longer than --max_length 7" in caplog.text
    assert tokenized["input_ids"][0] == tokenizer("the river " * 50)["input_ids"][:7]
    assert tokenized["labels"][:] == [0, 1, 0]
    assert all(
        len(ids) >= 1 and len(mask) == len(ids)
        for ids, mask in zip(
            *tokenized.select_columns(["input_ids", "attention_mask"]).to_dict().values(), strict=True
        )
    )
