# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import datasets
import pytest
import torch

from gma_hf.training.text.masking import MaskingCollator, mask_dataset
from gma_hf.training.text.tokenization import train_tokenizer


@pytest.fixture
def tokenizer(sentences):
    return train_tokenizer(iter(sentences(20)), 300, with_mask=True)


def test_the_shares_of_masked_random_and_kept_tokens(tokenizer):
    known = torch.tensor([i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids])
    generator = torch.Generator().manual_seed(0)
    ids = known[torch.randint(len(known), (200, 500), generator=generator)]
    before = ids.clone()
    masked, labels = MaskingCollator(tokenizer, 0.15).mask(ids, seed=0)
    assert torch.equal(ids, before)  # those of the caller stay
    drawn = labels != -100
    assert torch.equal(labels[drawn], ids[drawn])
    assert torch.equal(masked[~drawn], ids[~drawn])
    # 100,000 tokens: the standard deviation of the share drawn is 0.0011; of the others, among 15,000, below 0.0033
    assert abs(drawn.float().mean() - 0.15) < 0.005
    hidden = masked[drawn] == tokenizer.mask_token_id
    kept = masked[drawn] == ids[drawn]
    # One random token in 300 is the mask token, another the token itself
    assert abs(hidden.float().mean() - 0.8) < 0.015
    assert abs(kept.float().mean() - 0.1) < 0.015
    replaced = masked[drawn][~hidden & ~kept]
    assert len(replaced.unique()) > 0.9 * len(tokenizer)  # of all tokens, 1,500 draws among 300


def test_special_tokens_are_never_drawn(tokenizer):
    ids = torch.randint(0, len(tokenizer), (50, 50), generator=torch.Generator().manual_seed(0))
    _, labels = MaskingCollator(tokenizer, 1.0).mask(ids, seed=0)
    expected = ids.masked_fill(torch.isin(ids, torch.tensor(tokenizer.all_special_ids)), -100)
    assert torch.equal(labels, expected)


def test_evaluation_data_is_masked_once_and_training_data_anew(tokenizer):
    blocks = datasets.Dataset.from_dict({"input_ids": [list(range(10, 60)), list(range(60, 90))]})
    first, second = (mask_dataset(blocks, tokenizer, 0.3, seed=3) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert first.to_dict() != mask_dataset(blocks, tokenizer, 0.3, seed=4).to_dict()
    collate = MaskingCollator(tokenizer, 0.3)
    batch = collate(list(first))
    assert batch["labels"][0].tolist() == first["labels"][0]
    assert batch["attention_mask"].sum(1).tolist() == [50, 30]
    assert (batch["labels"][1, 30:] == -100).all()
    one, other = collate(list(blocks)), collate(list(blocks))
    assert not torch.equal(one["labels"], other["labels"])
