# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Masking for masked language modelling, as in BERT (Devlin et al., arXiv:1810.04805, section 3.1), by Transformers' collator.

Of the tokens drawn for prediction 80 % become the mask token, 10 % a random token, 10 % stay. Training data is masked anew
in every epoch. Evaluation data is masked once, from a seed of its own, so that scores of different steps can be compared.
"""

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from .packing import PackedCollator


class MaskingCollator(DataCollatorForLanguageModeling):
    """Stack blocks as `PackedCollator` does, and let Transformers mask those that have no labels yet.

    `DataCollatorForLanguageModeling` alone knows neither packed sequences nor blocks that are masked already.

    Args:
        tokenizer: has a mask token; its special tokens are never drawn.
        probability: share of the tokens to draw.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15):
        super().__init__(tokenizer, mlm_probability=probability)
        self._pack = PackedCollator(tokenizer.pad_token_id)
        self._special_ids = torch.tensor(tokenizer.all_special_ids)

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self._pack(examples)
        if "labels" not in examples[0]:
            batch["input_ids"], batch["labels"] = self.mask(batch["input_ids"])
        return batch

    def mask(self, input_ids: torch.Tensor, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw tokens to predict and hide most of them.

        Args:
            input_ids: `[batch, length]` token ids.
            seed: of the draw; by default torch's global generator draws.

        Returns:
            Masked ids, and labels with -100 where nothing is predicted; both like `input_ids`.
        """
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        is_special = torch.isin(input_ids, self._special_ids)
        return self.torch_mask_tokens(input_ids.clone(), special_tokens_mask=is_special)


def mask_dataset(blocks: Dataset, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> Dataset:
    """Mask blocks once and for all: columns `input_ids` and `labels`, the same for the same seed."""
    collator = MaskingCollator(tokenizer, probability)

    def mask(row: dict, index: int) -> dict:
        masked, labels = collator.mask(torch.tensor([row["input_ids"]]), seed + index)
        return {"input_ids": masked[0].tolist(), "labels": labels[0].tolist()}

    return blocks.map(mask, with_indices=True, desc="Masking the evaluation data", load_from_cache_file=False)
