# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Masking for masked language modelling, as in BERT (Devlin et al., arXiv:1810.04805, section 3.1).

Of the tokens drawn for prediction 80 % become the mask token, 10 % a random token, 10 % stay. Training data is masked
anew in every epoch; evaluation data once, from a seed of its own, so that scores of different steps can be compared.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .packing import IGNORE_INDEX, PackedCollator


def mask_tokens(
    input_ids: torch.Tensor,
    special_ids: torch.Tensor,
    mask_token_id: int,
    vocab_size: int,
    probability: float,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens to predict and hide most of them.

    Args:
        input_ids: `[..., length]` token ids.
        special_ids: `[n]` ids that are never drawn.
        mask_token_id: what hides a token.
        vocab_size: random replacements are drawn below it.
        probability: share of tokens to draw.
        generator: source of randomness, default torch's global one.

    Returns:
        Masked ids, and labels with `IGNORE_INDEX` where nothing is predicted; both like `input_ids`.
    """

    def draw(share: float) -> torch.Tensor:
        return torch.rand(input_ids.shape, generator=generator) < share

    drawn = draw(probability) & ~torch.isin(input_ids, special_ids)
    labels = input_ids.masked_fill(~drawn, IGNORE_INDEX)
    hidden = drawn & draw(0.8)
    replaced = drawn & ~hidden & draw(0.5)
    random_ids = torch.randint(vocab_size, input_ids.shape, generator=generator, dtype=input_ids.dtype)
    masked = torch.where(replaced, random_ids, input_ids.masked_fill(hidden, mask_token_id))
    return masked, labels


def mask_dataset(blocks: Dataset, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> Dataset:
    """Mask blocks once and for all: columns `input_ids` and `labels`, the same for the same seed."""

    def mask(row: dict, index: int) -> dict:
        generator = torch.Generator().manual_seed(seed + index)
        ids = torch.tensor(row["input_ids"])
        masked, labels = mask_tokens(
            ids,
            torch.tensor(tokenizer.all_special_ids),
            tokenizer.mask_token_id,
            len(tokenizer),
            probability,
            generator,
        )
        return {"input_ids": masked.tolist(), "labels": labels.tolist()}

    return blocks.map(mask, with_indices=True, desc="Masking the evaluation data", load_from_cache_file=False)


@dataclass
class MaskingCollator:
    """Stack blocks as `PackedCollator` does, and mask those that have no labels yet."""

    tokenizer: PreTrainedTokenizerBase
    probability: float = 0.15
    _pack: PackedCollator = field(init=False)

    def __post_init__(self):
        self._pack = PackedCollator(self.tokenizer.pad_token_id)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self._pack(examples)
        if "labels" not in examples[0]:
            special_ids = torch.tensor(self.tokenizer.all_special_ids)
            batch["input_ids"], batch["labels"] = mask_tokens(
                batch["input_ids"], special_ids, self.tokenizer.mask_token_id, len(self.tokenizer), self.probability
            )
        return batch
