# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Pack documents into blocks: tokenize them, join them with an end-of-text token between them, cut the tokens into blocks.

The stream of tokens is `<eot> document <eot> document <eot> ...`. Training cuts the stream into blocks without overlap, and
drops the last, incomplete block. The evaluation of a causal model loses no token: it keeps the last block, and each block
begins with the last token of the block before. So every token of the text is predicted exactly once.

Isolated documents begin with their own end-of-text token, and `position_ids` restart there, so models keep the documents
apart. This first token is no target.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, NamedSplit, Sequence, Value
from transformers import PreTrainedTokenizerBase

from ... import __version__
from ..arguments import LanguageModelingArguments
from ..errors import TrainingInputError
from .tokenization import separator_id


IGNORE_INDEX = -100  # labels that the loss leaves out


@dataclass
class PackedText:
    """
    Blocks of tokens, and the size of their text.

    Args:
        blocks (`datasets.Dataset`): the blocks, with the column `input_ids`, and `position_ids` if documents are isolated.
        num_bytes (`int`): UTF-8 bytes of the text.
        num_words (`int`): number of pieces between white space.
        num_documents (`int`): number of documents.
    """

    blocks: Dataset
    num_bytes: int
    num_words: int
    num_documents: int


def pack_documents(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    separator_id: int,
    block_size: int,
    split: str,
    isolate_documents: bool = False,
    predict_every_token: bool = False,
    keep_last: bool = False,
    num_proc: int | None = None,
) -> PackedText:
    """
    Tokenize documents, and pack them into blocks.

    Args:
        dataset (`datasets.Dataset`): columns `text` and `document_end`. The rows of a document follow each other.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer. Of its special tokens only `separator_id` is added.
        separator_id (`int`): id of the end-of-text token.
        block_size (`int`): tokens per block.
        split (`str`): name of the data in messages.
        isolate_documents (`bool`, *optional*, defaults to `False`): whether to add `position_ids` that restart at every
            document.
        predict_every_token (`bool`, *optional*, defaults to `False`): whether blocks overlap by one token of context, for
            the evaluation of causal models.
        keep_last (`bool`, *optional*, defaults to `False`): whether to keep the last block, which may be shorter.
        num_proc (`int`, *optional*): number of processes that tokenize.

    Returns:
        [`PackedText`]: the blocks, with the size of the text.

    Raises:
        TrainingInputError: if the text is shorter than one block, and the last block is not kept.
    """
    tokenized = dataset.map(
        tokenize_rows,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=num_proc,
        desc=f"Tokenizing ({split})",
    )
    # A text that was cut for validation may end within a document
    num_documents = sum(tokenized["document_end"]) + (not tokenized["document_end"][-1])
    num_tokens = sum(tokenized["num_tokens"])
    if not keep_last and num_tokens + num_documents < block_size:
        raise TrainingInputError(
            f"The {split} data has {num_tokens} tokens, fewer than one block of {block_size}. Give more text, or a "
            "smaller --block_size."
        )
    columns = {"input_ids": Sequence(Value("int32"))}
    if isolate_documents:
        columns["position_ids"] = Sequence(Value("int32"))
    stride = block_size - 1 if predict_every_token else block_size
    blocks = Dataset.from_generator(
        cut_into_blocks,
        features=Features(columns),
        split=NamedSplit(split),
        gen_kwargs={
            "tokenized": tokenized,
            "separator_id": separator_id,
            "block_size": block_size,
            "stride": stride,
            "isolate_documents": isolate_documents,
            "keep_last": keep_last,
            "cache_key": __version__,
        },
    )
    return PackedText(
        blocks=blocks,
        num_bytes=sum(tokenized["num_bytes"]),
        num_words=sum(tokenized["num_words"]),
        num_documents=num_documents,
    )


def pack_splits(
    splits: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, arguments: LanguageModelingArguments
) -> dict[str, PackedText]:
    """Pack the documents of every split. Outside of training every token is predicted, and no token is left out."""
    return {
        split: pack_documents(
            dataset,
            tokenizer,
            separator_id(tokenizer),
            arguments.block_size,
            split,
            isolate_documents=arguments.isolate_documents,
            predict_every_token=split != "train",
            keep_last=split != "train",
            num_proc=arguments.preprocessing_num_workers,
        )
        for split, dataset in splits.items()
    }


def tokenize_rows(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Token ids and sizes of a batch of rows."""
    texts = [text or "" for text in batch["text"]]
    # `verbose=False`: a row longer than the model's context is no mistake here, it gets cut into blocks
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {
        "input_ids": ids,
        "num_tokens": [len(row) for row in ids],
        "num_bytes": [len(text.encode("utf-8", "surrogatepass")) for text in texts],
        "num_words": [len(text.split()) for text in texts],
    }


def cut_into_blocks(
    tokenized: Dataset | IterableDataset,
    separator_id: int,
    block_size: int,
    stride: int,
    isolate_documents: bool,
    keep_last: bool,
    cache_key: str | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Cut the stream of tokens into blocks, see the top of this file."""
    overlap = block_size - stride
    tokens, starts = np.empty(0, np.int32), np.empty(0, bool)  # the stream so far; does a document start here?
    for piece_tokens, piece_starts in _stream(tokenized, separator_id, isolate_documents):
        tokens, starts = np.concatenate([tokens, piece_tokens]), np.concatenate([starts, piece_starts])
        begin = 0
        while begin + block_size <= len(tokens):
            window = slice(begin, begin + block_size)
            yield _block(tokens[window], starts[window], isolate_documents)
            begin += stride
        tokens, starts = tokens[begin:], starts[begin:]
    if keep_last and len(tokens) > overlap:
        yield _block(tokens, starts, isolate_documents)


def _stream(
    tokenized: Dataset | IterableDataset, separator_id: int, isolate_documents: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pieces of the stream: tokens, and whether a document starts at each token."""
    at_start = True
    first = True
    for batch in tokenized.select_columns(["input_ids", "document_end"]).iter(batch_size=256):
        tokens: list[int] = []
        start_positions: list[int] = []
        for row, document_end in zip(batch["input_ids"], batch["document_end"], strict=True):
            if first or (at_start and isolate_documents):
                start_positions.append(len(tokens))
                tokens.append(separator_id)
            first = at_start = False
            tokens += row
            if document_end:
                tokens.append(separator_id)
                at_start = True
        starts = np.zeros(len(tokens), bool)
        starts[start_positions] = True
        yield np.asarray(tokens, np.int32), starts


def _block(tokens: np.ndarray, starts: np.ndarray, isolate_documents: bool) -> dict[str, np.ndarray]:
    block = {"input_ids": tokens}
    if isolate_documents:
        index = np.arange(len(tokens), dtype=np.int32)
        # A block that begins within a document counts from its own beginning
        block["position_ids"] = index - np.maximum.accumulate(np.where(starts, index, 0)).astype(np.int32)
    return block


@dataclass
class PackedCollator:
    """
    Stack blocks into a batch with labels. Labels are the tokens themselves, without the first token of isolated documents.

    A batch with blocks of different lengths is padded on the right. The padding gets an `attention_mask`, labels that the
    loss ignores, and positions like another document.

    Args:
        pad_token_id (`int`): id of the padding token.

    Raises:
        ValueError: if `pad_token_id` is no id of a token.
    """

    pad_token_id: int

    def __post_init__(self):
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ValueError(
                f"`pad_token_id` must be the id of a token, got {self.pad_token_id!r}. Give `tokenizer.pad_token_id`; a "
                "tokenizer without a padding token can take its end of text: `tokenizer.pad_token = tokenizer.eos_token`."
            )

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        batch = {"input_ids": self._stack(examples, "input_ids", length, self.pad_token_id)}
        if "labels" in examples[0]:
            batch["labels"] = self._stack(examples, "labels", length, IGNORE_INDEX)
        else:
            batch["labels"] = self._stack(examples, "input_ids", length, IGNORE_INDEX)
        if "position_ids" in examples[0]:
            batch["position_ids"] = torch.stack(
                [
                    torch.cat([ids, torch.arange(length - len(ids))])
                    for ids in (torch.as_tensor(example["position_ids"], dtype=torch.long) for example in examples)
                ]
            )
            if "labels" not in examples[0]:
                batch["labels"][batch["position_ids"] == 0] = IGNORE_INDEX
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        if (lengths < length).any():
            batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        return batch

    @staticmethod
    def _stack(examples: list[dict], name: str, length: int, fill: int) -> torch.Tensor:
        stacked = torch.full((len(examples), length), fill, dtype=torch.long)
        for row, example in zip(stacked, examples, strict=True):
            row[: len(example[name])] = torch.as_tensor(example[name], dtype=torch.long)
        return stacked
