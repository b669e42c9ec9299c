# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import itertools

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gma_hf import GMAForCausalLM, GMAForMaskedLM
from gma_hf.training.errors import TrainingInputError
from gma_hf.training.text.packing import IGNORE_INDEX, PackedCollator, cut_into_blocks, pack_documents
from gma_hf.training.text.tokenization import train_tokenizer

from ..conftest import make_model, tiny_config


END = 0  # the separator in the tests below
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]


def blocks_of(documents, block_size, stride=None, isolate_documents=False, keep_last=True):
    tokenized = datasets.Dataset.from_dict({"input_ids": documents, "document_end": [True] * len(documents)})
    stride = stride or block_size
    return [
        {name: ids.tolist() for name, ids in block.items()}
        for block in cut_into_blocks(tokenized, END, block_size, stride, isolate_documents, keep_last, "")
    ]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


documents_strategy = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=9), min_size=1, max_size=8)


@given(documents=documents_strategy, block_size=st.integers(2, 12))
def test_training_blocks_are_the_stream_cut_up(documents, block_size):
    stream = [END] + [token for document in documents for token in [*document, END]]
    full = blocks_of(documents, block_size, keep_last=False)
    assert [len(block["input_ids"]) for block in full] == [block_size] * (len(stream) // block_size)
    kept = joined(block["input_ids"] for block in full)
    assert kept == stream[: len(kept)]
    assert joined(block["input_ids"] for block in blocks_of(documents, block_size)) == stream


@given(documents=documents_strategy, block_size=st.integers(2, 12))
def test_evaluation_predicts_every_token_exactly_once(documents, block_size):
    stream = [token for document in documents for token in [*document, END]]
    blocks = blocks_of(documents, block_size, stride=block_size - 1)
    # A causal loss predicts all but the first token of each block
    assert joined(block["input_ids"][1:] for block in blocks) == stream
    assert all(1 < len(block["input_ids"]) <= block_size for block in blocks)


@given(documents=documents_strategy, block_size=st.integers(2, 12))
def test_isolated_documents_are_predicted_whole_and_start_at_position_zero(documents, block_size):
    blocks = blocks_of(documents, block_size, stride=block_size - 1, isolate_documents=True)
    collate = PackedCollator(pad_token_id=99)
    predicted = []
    for block in blocks:
        batch = collate([block])
        predicted += [label for label in batch["labels"][0, 1:].tolist() if label != IGNORE_INDEX]
        positions = block["position_ids"]
        # Positions count up from 0, and restart only at the separator that opens a document
        assert positions[0] == 0
        for i in range(1, len(positions)):
            assert positions[i] == positions[i - 1] + 1 or (positions[i] == 0 and block["input_ids"][i] == END)
    assert predicted == [token for document in documents for token in [*document, END]]


def test_isolated_documents_begin_and_end_with_the_separator():
    (block,) = blocks_of(DOCUMENTS[:2], 16, isolate_documents=True)
    assert block["input_ids"] == [END, 1, 2, 3, END, END, 4, END]
    assert block["position_ids"] == [0, 1, 2, 3, 4, 0, 1, 2]
    labels = PackedCollator(pad_token_id=99)([block])["labels"][0].tolist()
    assert labels == [IGNORE_INDEX, 1, 2, 3, END, IGNORE_INDEX, 4, END]


@pytest.mark.parametrize(("model_class", "is_causal"), [(GMAForCausalLM, True), (GMAForMaskedLM, False)])
def test_models_keep_isolated_documents_apart(model_class, is_causal):
    model = make_model(model_class, tiny_config(is_causal=is_causal))
    (block,) = blocks_of(DOCUMENTS, 32, isolate_documents=True)
    batch = PackedCollator(pad_token_id=99)([block])
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    alone = [model(input_ids=torch.tensor([[END, *document, END]])).logits[0] for document in DOCUMENTS]
    # float32 sums over other chunks, through three layers
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_padding_is_no_target_and_its_own_document():
    batch = PackedCollator(pad_token_id=99)(blocks_of(DOCUMENTS, 6, isolate_documents=True)[-2:])
    is_pad = batch["attention_mask"] == 0
    assert is_pad.any()
    assert (batch["input_ids"][is_pad] == 99).all()
    assert (batch["labels"][is_pad] == IGNORE_INDEX).all()
    assert (batch["position_ids"][is_pad] == torch.arange(is_pad.sum())).all()
    assert "attention_mask" not in PackedCollator(99)(blocks_of(DOCUMENTS, 6, keep_last=False))


@pytest.fixture
def tokenizer(sentences):
    return train_tokenizer(iter(sentences(50)), 300)


def test_the_text_is_counted_and_comes_back_from_its_blocks(tokenizer, sentences):
    texts = [sentence + " ünï\n" for sentence in sentences(30)]
    rows = datasets.Dataset.from_dict({"text": texts, "document_end": [i % 10 == 9 for i in range(30)]})
    packed = pack_documents(rows, tokenizer, tokenizer.eos_token_id, 16, "test", keep_last=True)
    stream = joined(packed.blocks["input_ids"][:])
    assert tokenizer.decode(stream).strip(tokenizer.eos_token).split(tokenizer.eos_token) == [
        "".join(texts[i : i + 10]) for i in (0, 10, 20)
    ]
    assert packed.num_documents == 3
    assert packed.num_bytes == len("".join(texts).encode())
    assert packed.num_words == len(" ".join(texts).split())


def test_less_text_than_a_block_is_an_error(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["the river"], "document_end": [True]})
    with pytest.raises(
        TrainingInputError, match=r"train data has \d tokens, fewer than one block of 64.*--block_size"
    ):
        pack_documents(rows, tokenizer, tokenizer.eos_token_id, 64, "train")


@pytest.mark.parametrize("token", [None, -1, 1.5, "pad", True])
def test_a_padding_token_that_is_none_is_refused(token):
    with pytest.raises(ValueError, match="`pad_token_id` must be the id of a token"):
        PackedCollator(token)
