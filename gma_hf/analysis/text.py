# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A text as the analysis reads it: tokens with their surface categories, cut into blocks that fit the model."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import AnalysisError
from .surface import CATEGORIES, token_categories


CATEGORY_NAMES = list(CATEGORIES)
UNTRACKED = -1  # token type of a token whose preferences are not counted


@dataclass
class TokenBatch:
    """
    The tokens of one forward pass, with their categories and types.

    Args:
        inputs (`dict[str, torch.Tensor]`): the arguments of the model. An `attention_mask` marks real tokens.
        categories (`torch.Tensor` of shape `(batch, length)`, *optional*): indices of surface categories.
        token_types (`torch.Tensor` of shape `(batch, length)`, *optional*): indices of the tracked token types, `UNTRACKED`
            for other tokens.
    """

    inputs: dict[str, Tensor]
    categories: Tensor | None = None
    token_types: Tensor | None = None


@dataclass
class EncodedText:
    """
    A tokenized text.

    Args:
        token_ids (`torch.Tensor` of shape `(num_tokens,)`): the tokens, without the special tokens around the text.
        categories (`torch.Tensor` of shape `(num_tokens,)`): indices into `CATEGORY_NAMES`.
        prefix (`list[int]`): the special tokens before every block.
        suffix (`list[int]`): the special tokens after every block.
        type_ids (`list[int]`): token ids of the tracked token types, the most frequent type first.
        type_counts (`list[int]`): how often each of these types occurs.
    """

    token_ids: Tensor
    categories: Tensor
    prefix: list[int]
    suffix: list[int]
    type_ids: list[int]
    type_counts: list[int]

    def batches(self, block_size: int, batch_size: int) -> Iterator[TokenBatch]:
        """
        Cut the text into blocks, without overlap and without padding. A shorter last block is a batch of its own.

        Args:
            block_size (`int`): tokens per block, special tokens included.
            batch_size (`int`): blocks per batch.

        Yields:
            [`TokenBatch`]: the next blocks.

        Raises:
            AnalysisError: if the special tokens leave no room in a block.
        """
        room = block_size - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise AnalysisError(
                f"block_size is {block_size}, but the tokenizer puts {len(self.prefix) + len(self.suffix)} special "
                "tokens around every block. Choose a larger block_size."
            )
        types = torch.full((int(self.all_ids().max()) + 1,), UNTRACKED)
        types[self.type_ids] = torch.arange(len(self.type_ids))
        full = len(self.token_ids) // room * room
        blocks = [self.token_ids[:full].view(-1, room), self.token_ids[full:].view(1, -1)]
        labels = [self.categories[:full].view(-1, room), self.categories[full:].view(1, -1)]
        for block_group, label_group in zip(blocks, labels, strict=True):
            if block_group.numel() == 0:
                continue
            for ids, categories in zip(block_group.split(batch_size), label_group.split(batch_size), strict=True):
                ids, categories = self._with_special(ids, categories)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                yield TokenBatch(inputs, categories, types[ids])

    def _with_special(self, ids: Tensor, categories: Tensor) -> tuple[Tensor, Tensor]:
        def around(x: Tensor, before: list[int], behind: list[int]) -> Tensor:
            rows = len(x)
            return torch.cat([torch.tensor([before] * rows).long(), x, torch.tensor([behind] * rows).long()], dim=1)

        special = CATEGORY_NAMES.index("special")
        labels = around(categories, [special] * len(self.prefix), [special] * len(self.suffix))
        return around(ids, self.prefix, self.suffix), labels

    def all_ids(self) -> Tensor:
        """
        The tokens of the text and the special tokens around its blocks.

        Returns:
            `torch.Tensor` of shape `(num_tokens + num_special_tokens,)`: token ids.
        """
        return torch.cat([self.token_ids, torch.tensor(self.prefix + self.suffix).long()])


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    max_tokens: int | None = None,
    max_token_types: int = 512,
) -> EncodedText:
    """
    Tokenize a text, or the pieces of a text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any Hugging Face tokenizer of text.
        text (`str` or `Iterable[str]`): a text, or its pieces in order (documents, chapters). Pieces beyond `max_tokens` are
            not read.
        max_tokens (`int`, *optional*): the largest number of tokens; by default the whole text is read.
        max_token_types (`int`, *optional*, defaults to `512`): how many of the most frequent token types are tracked.

    Returns:
        [`EncodedText`]: the tokens, with their categories and types.

    Raises:
        AnalysisError: if the text gives no token.
    """
    token_ids: list[int] = []
    for piece in [text] if isinstance(text, str) else text:
        token_ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if max_tokens is not None and len(token_ids) >= max_tokens:
            token_ids = token_ids[:max_tokens]
            break
    if not token_ids:
        raise AnalysisError("The text is empty: it gives no token. Give a text with words in it.")
    prefix, suffix = _special_tokens_around(tokenizer)
    counts = Counter(token_ids).most_common(max_token_types)
    return EncodedText(
        token_ids=torch.tensor(token_ids),
        categories=torch.tensor([CATEGORY_NAMES.index(name) for name in token_categories(tokenizer, token_ids)]),
        prefix=prefix,
        suffix=suffix,
        type_ids=[token_id for token_id, _ in counts],
        type_counts=[count for _, count in counts],
    )


def check_vocabulary(model: PreTrainedModel, encoded: EncodedText) -> None:
    """
    Check that the model has an embedding for every token.

    Raises:
        AnalysisError: if the model has too few embeddings, because the tokenizer belongs to another model.
    """
    size = model.get_input_embeddings().weight.shape[0]
    largest = int(encoded.all_ids().max())
    if largest >= size:
        raise AnalysisError(
            f"The text has the token id {largest}, but the model has only {size} embeddings: the tokenizer does not "
            "belong to the model. Name the right one."
        )


def default_block_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, preferred: int = 512) -> int:
    """Tokens per block: the preferred number, or the largest number that the model and its tokenizer allow."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    return min([preferred, *(limit for limit in limits if limit)])


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
