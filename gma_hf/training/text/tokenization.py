# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The tokenizers of the training commands: loaded by name, or a byte-level BPE trained on the data."""

import logging
from collections.abc import Iterator

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import TrainingInputError, why_not_loaded


logger = logging.getLogger(__name__)

END_OF_TEXT, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
LARGEST_VOCABULARY = 2**24


def train_tokenizer(texts: Iterator[str], vocab_size: int, with_mask: bool = False) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer. It can encode every text, and decoding returns exactly the same text.

    Args:
        texts (`Iterator[str]`): the training text, in pieces.
        vocab_size (`int`): number of tokens, special tokens included. A short text gives fewer tokens.
        with_mask (`bool`, *optional*, defaults to `False`): whether to add a mask token, for masked language modelling.

    Returns:
        `PreTrainedTokenizerFast`: a tokenizer with `<|endoftext|>` as bos and eos, with `<|pad|>`, and with `<|mask|>` if
        requested. It returns `input_ids` and `attention_mask`.

    Raises:
        TrainingInputError: if `vocab_size` is no whole number, or smaller than the number of bytes (256) and special tokens.
    """
    special_tokens = [END_OF_TEXT, PAD] + ([MASK] if with_mask else [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    is_number = isinstance(vocab_size, int) and not isinstance(vocab_size, bool)
    if not is_number or not smallest <= vocab_size <= LARGEST_VOCABULARY:
        raise TrainingInputError(
            f"--tokenizer_vocab_size must be a whole number of at least {smallest} ({len(alphabet)} bytes and "
            f"{len(special_tokens)} special tokens) and at most {LARGEST_VOCABULARY}, got {vocab_size!r}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=MASK if with_mask else None,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def get_tokenizer(
    name: str | None, dataset: Dataset, vocab_size: int, with_mask: bool = False, **options
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer `name`, or train a tokenizer on the column `text` of a data set if there is no name. The tokenizer has
    a padding token.

    Raises:
        TrainingInputError: if the tokenizer cannot be loaded, or lacks a mask token that is needed.
    """
    if name is None:
        logger.info("Training a byte-level BPE tokenizer of up to %d tokens on the training data.", vocab_size)
        return train_tokenizer((text for text in dataset["text"]), vocab_size, with_mask)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise TrainingInputError(f"Cannot load the tokenizer {name!r}: {why_not_loaded(name, error)}") from error
    if with_mask and tokenizer.mask_token_id is None:
        raise TrainingInputError(
            f"The tokenizer {name!r} has no mask token, which masked language modelling needs. Choose another, or leave "
            "--tokenizer_name out to train one."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is not None:
            # This needs no new embedding, and the attention mask separates padding from the end of a text
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    The id of the token between documents: the end-of-text token, or the separator of an encoder.

    Raises:
        TrainingInputError: if the tokenizer has neither.
    """
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token_id is not None:
            return token_id
    raise TrainingInputError(
        "The tokenizer has neither an eos nor a sep token to put between documents. Choose another one with --tokenizer_name."
    )
