# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Masking for masked language modelling, as in BERT (Devlin et al., arXiv:1810.04805, section 3.1), by the collator of
Transformers.

Of the tokens drawn for prediction, 80 % become the mask token, 10 % become a random token, and 10 % stay. Training data is
masked anew in every epoch. Evaluation data is masked once, with its own seed, so that scores of different steps can be
compared.
"""

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from .packing import PackedCollator


class MaskingCollator(DataCollatorForLanguageModeling):
    """
    Stack blocks as `PackedCollator` does, and let Transformers mask blocks without labels.

    `DataCollatorForLanguageModeling` alone does not know packed sequences, or blocks that are masked already.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with a mask token. Its special tokens are never drawn.
        probability (`float`): share of the tokens to draw.
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
        """
        Draw tokens to predict, and hide most of them.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`): token ids.
            seed (`int`, *optional*): seed of the draw; by default the global generator of torch draws.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: masked ids, and labels with -100 at tokens that are not predicted.
        """
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        is_special = torch.isin(input_ids, self._special_ids)
        return self.torch_mask_tokens(input_ids.clone(), special_tokens_mask=is_special)


def mask_dataset(blocks: Dataset, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> Dataset:
    """Mask blocks once: columns `input_ids` and `labels`, the same for the same seed."""
    collator = MaskingCollator(tokenizer, probability)

    def mask(row: dict, index: int) -> dict:
        masked, labels = collator.mask(torch.tensor([row["input_ids"]]), seed + index)
        return {"input_ids": masked[0].tolist(), "labels": labels[0].tolist()}

    return blocks.map(mask, with_indices=True, desc="Masking the evaluation data", load_from_cache_file=False)
