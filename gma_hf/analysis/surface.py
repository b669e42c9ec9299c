# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The surface of tokens: one category per token, for the vocabulary of any Hugging Face tokenizer.

Vocabularies mark the beginning of a word in different ways. So each token is first replaced by the text that it stands for,
with a space where a word begins. Then the same rules give the category of every token.
"""

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


# In order of precedence: a token belongs to the first category whose description fits
CATEGORIES = {
    "special": "a special token, such as the beginning or end of a text, padding, or unknown",
    "whitespace": "white space alone: spaces, line breaks, indentation",
    "number": "digits, perhaps with punctuation, no letters",
    "punctuation": "punctuation and symbols, no letters or digits",
    "continuation": "goes on with a word that an earlier token began",
    "function word": "a whole English function word (articles, pronouns, prepositions, ...), in any case",
    "capitalised": "begins a word with a capital letter",
    "word": "begins a word with a small letter, or a letter without case",
    "other": "anything else, such as one byte of a longer character",
}

FUNCTION_WORDS = frozenset(
    "a about above after again against all also although am an and any are as at be because been before being below "
    "between both but by can cannot could did do does doing down during each either else few for from further had has "
    "have having he her here hers herself him himself his how however i if in into is it its itself just may me might "
    "more most must my myself neither no nor not of off on once only onto or other our ours ourselves out over own per "
    "same shall she should since so some such than that the their theirs them themselves then there these they this "
    "those though through to too under until up upon us very was we were what when where whether which while who whom "
    "whose why will with within without would yet you your yours yourself yourselves".split()
)

WORD_MARK, BYTE_LEVEL_MARK = "\u2581", "\u0120"  # of SentencePiece and of byte-level BPE
APOSTROPHES = "'\u2019"


def token_surfaces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """
    The text that each token stands for, with a space where its word begins (in some vocabularies: where its word ends).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer: byte-level BPE, SentencePiece, WordPiece, BPE with end-of-word
            marks, characters.
        token_ids (`Sequence[int]`): the tokens.

    Returns:
        `list[str]`: one string per token. A byte that is no character by itself becomes the replacement character U+FFFD.
    """
    unique = sorted(set(token_ids))
    pieces = tokenizer.convert_ids_to_tokens(unique)
    special = set(tokenizer.all_special_ids)
    style = _word_marking(tokenizer)
    surfaces = {}
    for token_id, piece in zip(unique, pieces, strict=True):
        if piece is None:
            surfaces[token_id] = "\ufffd"
        elif token_id in special:
            surfaces[token_id] = piece
        elif style == "sentencepiece":
            surfaces[token_id] = _byte(piece) or piece.replace(WORD_MARK, " ")
        elif style == "wordpiece":
            surfaces[token_id] = piece[2:] if piece.startswith("##") else f" {piece}"
        elif style == "end of word":
            surfaces[token_id] = piece.removesuffix("</w>") + " " * piece.endswith("</w>")
        elif style == "to be continued":
            surfaces[token_id] = piece[:-2] if piece.endswith("@@") else f"{piece} "
        else:
            surfaces[token_id] = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return [surfaces[token_id] for token_id in token_ids]


def token_categories(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """
    The surface category of each token of a text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer, see [`token_surfaces`].
        token_ids (`Sequence[int]`): the tokens of one text, in order. The category depends on the neighbours: the token
            before decides whether a token continues a word, and the token after decides whether a token is a whole word.

    Returns:
        `list[str]`: one key of `CATEGORIES` per token.
    """
    surfaces = token_surfaces(tokenizer, token_ids)
    special = set(tokenizer.all_special_ids)
    is_special = [token_id in special for token_id in token_ids]
    # A special token is the border of a word, whatever its name
    texts = [" " if border else surface for border, surface in zip(is_special, surfaces, strict=True)]
    attached = [_goes_on(before, text) for before, text in zip([" ", *texts[:-1]], texts, strict=True)]
    ends_word = [not follows for follows in [*attached[1:], False]]
    return ["special" if is_special[i] else _category(text, attached[i], ends_word[i]) for i, text in enumerate(texts)]


def visible(surface: str) -> str:
    """A token as reports write it, with visible white space."""
    for white_space, mark in (("\r", "\u240d"), ("\n", "\u21b5"), ("\t", "\u2192"), (" ", "\u00b7")):
        surface = surface.replace(white_space, mark)
    # A browser does not show other control characters, and XML does not allow them
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cs") else char for char in surface) or "\u2205"


def _category(surface: str, attached: bool, ends_word: bool) -> str:
    text = surface.strip()
    letters = [char for char in text if char.isalpha()]
    if not text:
        return "whitespace" if surface else "other"
    if not letters and any(char.isdigit() for char in text):
        return "number"
    if all(unicodedata.category(char)[0] in "PS" and char != "\ufffd" for char in text):
        return "punctuation"
    if not letters:
        return "other"
    if attached:
        return "continuation"
    if ends_word and text.lower() in FUNCTION_WORDS:
        return "function word"
    return "capitalised" if letters[0].isupper() or letters[0].istitle() else "word"


def _goes_on(before: str, text: str) -> bool:
    """Whether `text` continues the word at the end of `before`: `read` + `_lines`, `don` + `'t`."""
    within_word = _is_word_char(before[-1:]) and _is_word_char(text[:1])
    contraction = _is_word_char(before[-1:]) and text[:1] in tuple(APOSTROPHES) and text[1:2].isalpha()
    return within_word or contraction


def _is_word_char(char: str) -> bool:
    # Combining marks (M) belong to the letter before them
    return char == "_" or char.isalnum() or (char != "" and unicodedata.category(char)[0] == "M")


def _word_marking(tokenizer: PreTrainedTokenizerBase) -> str:
    """How most tokens of a vocabulary mark the border of a word."""
    vocabulary = tokenizer.get_vocab()
    counts = {
        "byte level": sum(piece.startswith(BYTE_LEVEL_MARK) for piece in vocabulary),
        "sentencepiece": sum(piece.startswith(WORD_MARK) for piece in vocabulary),
        "wordpiece": sum(piece.startswith("##") for piece in vocabulary),
        "end of word": sum(piece.endswith("</w>") for piece in vocabulary),
        "to be continued": sum(piece.endswith("@@") for piece in vocabulary),
    }
    style = max(counts, key=counts.get)
    return style if counts[style] > 0 else "plain"


def _byte(piece: str) -> str | None:
    """The character of SentencePiece's byte fallback `<0x0A>`; None for other pieces."""
    if len(piece) != 6 or not piece.startswith("<0x") or not piece.endswith(">"):
        return None
    value = int(piece[3:5], 16)
    return chr(value) if value < 128 else "\ufffd"
