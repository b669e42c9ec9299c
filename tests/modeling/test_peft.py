# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""PEFT adapters train on GMA models and merge into them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import gma_hf
from tests.conftest import make_model, tiny_config


peft = pytest.importorskip("peft")


@pytest.mark.parametrize("target_modules", [["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"])
def test_lora_trains_with_the_mixtures_and_merges(block, tokens, target_modules, tmp_path):
    base = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=target_modules, modules_to_save=["mixture_norm"]
    )
    model = peft.get_peft_model(base, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, frozen = [], {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {"lora_A", "lora_B"} <= {part for name in trainable for part in name.split(".")}
        assert any("means" in name for name in trainable)
        assert all(p.grad is not None for p in trainable.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Twenty steps on the same 36 tokens, learnt by adapters and mixtures alone: embeddings and head stay as they are
    assert losses[-1] < 0.85 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())

    model.eval()
    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reloaded = peft.PeftModel.from_pretrained(reloaded, tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(input_ids=tokens).logits, expected, rtol=0, atol=0)

    merged = model.merge_and_unload()
    assert isinstance(merged, gma_hf.GMAForCausalLM)
    # W + BA is rounded to float32 once more than W x + B A x
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-3, atol=1e-4)
