# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Surface categories mean the same in every kind of vocabulary; every token has exactly one."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gma_hf.analysis import CATEGORIES, encode_text, token_categories, token_surfaces
from gma_hf.analysis.surface import visible
from gma_hf.analysis.text import CATEGORY_NAMES, UNTRACKED
from gma_hf.training import train_tokenizer

from .conftest import TEXT


SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]


def wrap(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def words(style):
    """A tokenizer whose vocabulary marks the borders of words as the style does, and knows these pieces only."""
    if style == "byte level":
        pieces = ["Ġthe", "Ġriver", "ĠThe", "Ġrun", "s", ",", "Ġ12", "Ċ", "ĠĠ", "ĠAnna", "_x", "Ġ", "Ã"]
        decoder = decoders.ByteLevel()
    elif style == "sentencepiece":
        pieces = ["▁the", "▁river", "▁The", "▁run", "s", ",", "▁12", "<0x0A>", "▁▁", "▁Anna", "_x", "▁", "<0xC3>"]
        decoder = decoders.Metaspace()
    elif style == "wordpiece":
        pieces = ["the", "river", "The", "run", "##s", ",", "12", "Anna", "##_x"]
        decoder = decoders.WordPiece()
    elif style == "end of word":
        pieces = ["the</w>", "river</w>", "The</w>", "run", "s</w>", ",</w>", "12</w>", "Anna", "_x</w>"]
        decoder = decoders.BPEDecoder()
    else:
        pieces = ["the", "river", "The", "run@@", "s", ",", "12", "Anna@@", "_x"]
        decoder = None
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(SPECIAL + pieces)}, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return wrap(tokenizer), {piece: i for i, piece in enumerate(SPECIAL + pieces)}


EXPECTED = {
    "the": "function word",
    "river": "word",
    "The": "function word",
    "run": "word",
    "s": "continuation",
    ",": "punctuation",
    "12": "number",
    "Anna": "capitalised",
    "_x": "continuation",
}
MARKS = {
    "byte level": lambda text: text.replace("Ġ", ""),
    "sentencepiece": lambda text: text.replace("▁", ""),
    "wordpiece": lambda text: text.replace("##", ""),
    "end of word": lambda text: text.replace("</w>", ""),
    "to be continued": lambda text: text.replace("@@", ""),
}


@pytest.mark.quick
@pytest.mark.parametrize("style", list(MARKS))
def test_words_are_recognised_in_every_vocabulary(style):
    tokenizer, vocabulary = words(style)
    bare = {MARKS[style](piece): token for piece, token in vocabulary.items()}
    sequence = ["the", "river", "run", "s", ",", "12", "The", "Anna", "_x"]
    ids = [vocabulary["<s>"], *(bare[piece] for piece in sequence)]
    assert token_categories(tokenizer, ids) == ["special", *(EXPECTED[piece] for piece in sequence)]


@pytest.mark.quick
@pytest.mark.parametrize("style", ["byte level", "sentencepiece"])
def test_white_space_and_broken_characters(style):
    tokenizer, vocabulary = words(style)
    line_break, spaces, byte = {
        "byte level": ("Ċ", "ĠĠ", "Ã"),
        "sentencepiece": ("<0x0A>", "▁▁", "<0xC3>"),
    }[style]
    ids = [vocabulary[piece] for piece in (line_break, spaces, byte)]
    assert token_categories(tokenizer, ids) == ["whitespace", "whitespace", "other"]
    assert token_surfaces(tokenizer, ids) == ["\n", "  ", "\ufffd"]


def test_a_token_is_judged_by_its_neighbours():
    tokenizer, vocabulary = words("byte level")
    # `the` of `thes` is no function word; behind a line break and behind `</s>` a bare `s` begins a word
    ids = [vocabulary[piece] for piece in ("Ġthe", "s", "Ċ", "s", "</s>", "s")]
    expected = ["word", "continuation", "whitespace", "word", "special", "word"]
    assert token_categories(tokenizer, ids) == expected


def trained(kind):
    if kind == "byte level":
        return train_tokenizer([TEXT], 330)
    special = {"special_tokens": SPECIAL, "vocab_size": 150}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **special)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**special)
    elif kind == "end of word":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **special)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(**{**special, "vocab_size": 60})
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return wrap(tokenizer)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["byte level", "unigram", "wordpiece", "end of word", "characters"])
def test_the_surfaces_of_a_trained_vocabulary_spell_the_text(kind):
    tokenizer = trained(kind)
    encoded = encode_text(tokenizer, TEXT)
    ids = encoded.token_ids.tolist()
    text = TEXT.lower() if kind == "wordpiece" else TEXT
    surfaces = "".join(token_surfaces(tokenizer, ids))
    assert "".join(surfaces.split()) == "".join(text.split())
    categories = [CATEGORY_NAMES[index] for index in encoded.categories.tolist()]
    assert len(categories) == len(ids) and set(categories) <= set(CATEGORIES)
    numbers = "".join(
        s for s, name in zip(token_surfaces(tokenizer, ids), categories, strict=True) if name == "number"
    )
    assert sum(char.isdigit() for char in numbers) == sum(char.isdigit() for char in TEXT)
    assert ("special" in categories) is False
    if kind != "byte level":
        assert (encoded.prefix, encoded.suffix) == ([2], [3])


def test_words_begin_where_the_text_says():
    """Every word of the text, split at all that is no letter, digit or underscore, begins with exactly one token."""
    tokenizer = trained("byte level")
    text = "The river runs past old mills and children gather stones in winter."
    encoded = encode_text(tokenizer, text)
    categories = [CATEGORY_NAMES[index] for index in encoded.categories.tolist()]
    begins = sum(name in ("word", "capitalised", "function word") for name in categories)
    assert begins == len(text.split())


def test_blocks_hold_every_token_once_between_the_special_ones():
    tokenizer = trained("unigram")
    encoded = encode_text(tokenizer, TEXT, max_token_types=5)
    batches = list(encoded.batches(block_size=12, batch_size=3))
    rows = [row for batch in batches for row in batch.inputs["input_ids"].tolist()]
    assert [token for row in rows for token in row[1:-1]] == encoded.token_ids.tolist()
    assert all(row[0] == 2 and row[-1] == 3 for row in rows)
    assert all(len(row) == 12 for row in rows[:-1])
    labels = [row for batch in batches for row in batch.categories.tolist()]
    special = CATEGORY_NAMES.index("special")
    assert [label for row in labels for label in row[1:-1]] == encoded.categories.tolist()
    assert all(row[0] == row[-1] == special for row in labels)
    types = [row for batch in batches for row in batch.token_types.tolist()]
    for row, ids in zip(types, rows, strict=True):
        tracked = [encoded.type_ids.index(i) if i in encoded.type_ids else UNTRACKED for i in ids]
        assert row == tracked
    assert encoded.type_counts == sorted(encoded.type_counts, reverse=True)


def test_reading_stops_where_it_is_told():
    tokenizer = trained("byte level")

    def pieces():
        yield "the river " * 50
        raise AssertionError("read on")

    assert len(encode_text(tokenizer, pieces(), max_tokens=20).token_ids) == 20


def test_white_space_is_made_visible():
    assert visible(" a\n\t") == "·a↵→"
    assert visible("\x00") == "\ufffd" and visible("") == "∅"
