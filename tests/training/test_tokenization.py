# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import datasets
import pytest
from transformers import AutoTokenizer

from gma_hf.training.errors import TrainingInputError
from gma_hf.training.text.tokenization import get_tokenizer, separator_id, train_tokenizer


pytestmark = pytest.mark.quick


@pytest.fixture
def tokenizer(sentences):
    return train_tokenizer(iter(sentences(100)), 320, with_mask=True)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("the river runs", " two  spaces , odd .\n\n\ttab\r\n", "ünïcödé 漢字 🙂 \u2028 \x00"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_trained_tokenizer_has_what_training_needs(tokenizer):
    assert len(tokenizer) == 320
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert (tokenizer.pad_token, tokenizer.mask_token) == ("<|pad|>", "<|mask|>")
    assert set(tokenizer("the river")) == {"input_ids", "attention_mask"}
    assert separator_id(tokenizer) == tokenizer.eos_token_id


def test_a_trained_tokenizer_is_saved_and_loaded_unchanged(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "the river <|mask|> runs past\n old mills"
    assert dict(loaded(text)) == dict(tokenizer(text))
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_training_a_tokenizer_is_deterministic(sentences):
    first, second = (train_tokenizer(iter(sentences(100)), 320).get_vocab() for _ in range(2))
    assert first == second


def test_a_vocabulary_without_room_for_the_bytes_is_an_error(sentences):
    with pytest.raises(TrainingInputError, match="at least 259"):
        train_tokenizer(iter(sentences(5)), 258, with_mask=True)


@pytest.mark.parametrize("size", [float("nan"), 320.5, "320", True, 2**70])
def test_a_vocabulary_size_that_is_no_number_of_tokens_is_an_error(size, sentences):
    with pytest.raises(TrainingInputError, match="--tokenizer_vocab_size must be a whole number"):
        train_tokenizer(iter(sentences(10)), size)


def test_a_missing_padding_token_is_supplied(tokenizer, tmp_path):
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    empty = datasets.Dataset.from_dict({"text": []})
    assert get_tokenizer(str(tmp_path), empty, 320).pad_token == "<|endoftext|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert get_tokenizer(str(tmp_path), empty, 320).pad_token == "<|pad|>"


def test_tokenizers_that_do_not_fit_are_refused(sentences, tmp_path):
    train_tokenizer(iter(sentences(5)), 300).save_pretrained(tmp_path)
    empty = datasets.Dataset.from_dict({"text": []})
    with pytest.raises(TrainingInputError, match="no mask token"):
        get_tokenizer(str(tmp_path), empty, 300, with_mask=True)
    with pytest.raises(TrainingInputError, match="Cannot load the tokenizer 'no/such_tokenizer'"):
        get_tokenizer("no/such_tokenizer", empty, 300)
