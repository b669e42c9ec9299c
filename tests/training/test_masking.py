# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import datasets
import torch

from gma_hf.training.text.masking import MaskingCollator, mask_dataset, mask_tokens
from gma_hf.training.text.tokenization import train_tokenizer


def test_the_shares_of_masked_random_and_kept_tokens():
    ids = torch.randint(10, 1000, (200, 500))
    masked, labels = mask_tokens(ids, torch.tensor([0, 1]), 1, 1000, 0.15, generator=torch.Generator().manual_seed(0))
    drawn = labels != -100
    assert torch.equal(labels[drawn], ids[drawn])
    assert torch.equal(masked[~drawn], ids[~drawn])
    # 100,000 tokens: the standard deviation of the share drawn is 0.0011; of the others, among 15,000, below 0.0033
    assert abs(drawn.float().mean() - 0.15) < 0.005
    assert abs((masked[drawn] == 1).float().mean() - 0.8) < 0.015
    assert abs((masked[drawn] == ids[drawn]).float().mean() - 0.1) < 0.015


def test_special_tokens_are_never_drawn():
    ids = torch.randint(0, 4, (50, 50))
    _, labels = mask_tokens(ids, torch.tensor([0, 3]), 3, 4, 0.9)
    assert set(labels.unique().tolist()) == {-100, 1, 2}


def test_evaluation_data_is_masked_once_and_training_data_anew(sentences):
    tokenizer = train_tokenizer(iter(sentences(20)), 300, with_mask=True)
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
