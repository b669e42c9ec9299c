# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A text as the analysis reads it: tokens with their surface categories, cut into blocks of the model's length."""

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
    """One forward pass's tokens, and what is known about them.

    Attributes:
        inputs: what the model takes; an `attention_mask` tells real tokens from padding.
        categories: `[batch, length]` indices of surface categories, or None.
        token_types: `[batch, length]` indices of the tracked token types, `UNTRACKED` for the others, or None.
    """

    inputs: dict[str, Tensor]
    categories: Tensor | None = None
    token_types: Tensor | None = None


@dataclass
class EncodedText:
    """A tokenized text.

    Attributes:
        token_ids: `[num_tokens]`, without the special tokens that the tokenizer puts around a text.
        categories: `[num_tokens]` indices into `CATEGORY_NAMES`.
        prefix, suffix: the special tokens that stand around every block.
        type_ids: token ids of the tracked token types, the most frequent first.
        type_counts: how often each of them occurs.
    """

    token_ids: Tensor
    categories: Tensor
    prefix: list[int]
    suffix: list[int]
    type_ids: list[int]
    type_counts: list[int]

    def batches(self, block_size: int, batch_size: int) -> Iterator[TokenBatch]:
        """Cut the text into blocks of `block_size` tokens, special tokens included, `batch_size` blocks at a time.

        Nothing is padded: a shorter last block comes by itself.
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
        """The tokens of the text and the special tokens around its blocks."""
        return torch.cat([self.token_ids, torch.tensor(self.prefix + self.suffix).long()])


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    max_tokens: int | None = None,
    max_token_types: int = 512,
) -> EncodedText:
    """Tokenize a text, or the pieces of one.

    Args:
        tokenizer: any Hugging Face tokenizer of text.
        text: a text, or its pieces in order (documents, chapters); read only as far as `max_tokens` needs.
        max_tokens: stop behind so many tokens; None reads everything.
        max_token_types: how many different tokens, the most frequent ones, have their preferences counted.

    Raises:
        AnalysisError: the text gives no token.
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
    """Check that the model has an embedding for every token.

    Raises:
        AnalysisError: it has not, so the tokenizer is another model's.
    """
    size = model.get_input_embeddings().weight.shape[0]
    largest = int(encoded.all_ids().max())
    if largest >= size:
        raise AnalysisError(
            f"The text has the token id {largest}, but the model has only {size} embeddings: the tokenizer does not "
            "belong to the model. Name the right one."
        )


def default_block_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, preferred: int = 512) -> int:
    """Tokens per block: the preferred number, or less where the model or its tokenizer end before."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    return min([preferred, *(limit for limit in limits if limit)])


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
