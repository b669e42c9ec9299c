# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL puts several examples into one sequence, and they count as if each stood alone."""

import itertools

import pytest
import torch

import gma_hf
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import make_softmax_model


trl = pytest.importorskip("trl", reason="these tests train with TRL")

NAMES = ["os", "sys", "json, math", "re", "typing, abc, enum, io", "copy", "time", "csv, gzip"]


def converted(vocab_size: int, **options):
    return gma_hf.convert_to_gma(make_softmax_model("llama", vocab_size=vocab_size), num_components=6, **options)


MODELS = {
    "gated": lambda vocab: make_model(gma_hf.GMAForCausalLM, tiny_config("gated", vocab_size=vocab)),
    "windowed": lambda vocab: make_model(gma_hf.GMAForCausalLM, tiny_config("windowed", vocab_size=vocab)),
    "hybrid": lambda vocab: make_model(gma_hf.GMAForCausalLM, tiny_config("hybrid", vocab_size=vocab)),
    "converted": lambda vocab: converted(vocab),
    "converted with a window": lambda vocab: converted(vocab, window_size=4),
}


def separate_loss(model, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The mean over all predicted tokens, every example read alone."""
    total, count = 0.0, 0
    for ids, targets, positions in zip(input_ids, labels, position_ids, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            wanted = targets[start + 1 : end]
            if (wanted != -100).any():
                logits = model(input_ids=ids[None, start:end]).logits[0, :-1].float()
                total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)
                count += int((wanted != -100).sum())
    return total / count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padding-free"])
def test_examples_in_one_sequence_have_the_loss_and_gradient_of_separate_examples(name, packing, tokenizer, tmp_path):
    from datasets import Dataset

    model = MODELS[name](len(tokenizer))
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            str(tmp_path),
            packing=packing,
            padding_free=True,
            max_length=48 if packing else None,
            per_device_train_batch_size=4,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"text": f"import {name}\n"} for name in NAMES]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    positions = batch["position_ids"]
    assert (positions == 0).sum() > len(positions), "nothing was packed, so this test shows nothing"

    model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = separate_loss(model, batch["input_ids"], batch["labels"], positions)
    expected.backward()
    # float32: sums over some hundred tokens in another order
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(
                found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
