# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Converted models train as models of Transformers do."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import gma_hf
from tests.conversion.tiny_models import VOCAB, make_converted_model, output_of


OPTIONS = {"layers": [1], "window_size": 3, "use_forgetting": True, "use_routing_projections": True}


@pytest.fixture
def tokens():
    return torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))


def test_the_trainer_trains_saves_and_resumes(tokens, tmp_path):
    model = make_converted_model("llama", **OPTIONS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        bf16=True,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    decayed = trainer.get_decay_parameter_names(model)
    # A decay would pull components together, and windows and gates to nothing in particular
    undecayed = ("mixture_norm", "window_norm", "bias")
    assert not [name for name in decayed if any(part in name for part in undecayed)]
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss_of_two_rows = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    trainer.train()
    # Every step logs the loss of its two rows. The first rows are those of the model before any training
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(loss_of_two_rows, rel=2e-2)  # bfloat16 keeps 8 bits
    assert all((tensor != before[name]).any() for name, tensor in model.state_dict().items() if "gma" in name)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert type(resumed) is type(model)
    again = Trainer(model=resumed, args=arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4
    # The same rows in the same order on the same weights: the resumed run ends where the whole one did
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], msg=name)


@pytest.mark.quick
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, tokens):
    model = make_converted_model("llama", **OPTIONS).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.quick
def test_bfloat16_stays_close_to_float32(tokens):
    """Weights and activations have 8 bits: relative errors of 2^-8 each, of which a handful add up over two layers."""
    model = make_converted_model("llama", window_size=3, use_forgetting=True)
    expected = output_of(model, input_ids=tokens)
    output = output_of(model.to(torch.bfloat16), input_ids=tokens)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 16 * 2**-8 * expected.norm()


@pytest.mark.parametrize("window_size", [0, 4])
def test_autocast_gives_gma_the_16_bits_that_it_gives_softmax(window_size, tokens):
    """Rotary positions make float32 of queries and keys again; kernels for float32 would be several times as slow."""
    model = make_converted_model("llama", window_size=window_size)
    layers = gma_hf.gma_layers(model).values()
    seen = []
    for layer in layers:
        layer.mixture_norm.register_forward_pre_hook(lambda module, states: seen.extend(states))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert len(seen) == 3 * len(layers) and {x.dtype for x in seen} == {torch.bfloat16}
    assert all(parameter.grad.dtype == torch.float32 for layer in layers for parameter in layer.parameters())


def test_adapters_train_beside_the_mixtures(tokens, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_converted_model("llama", **OPTIONS)
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["gma"]
    )
    model = peft.get_peft_model(base, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert any("lora_A" in name for name in trained) and any("means" in name for name in trained)
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = output_of(model, input_ids=tokens)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert torch.equal(output_of(loaded, input_ids=tokens), expected)


PARALLEL = """
import sys
import torch, gma_hf
from transformers import AutoModelForCausalLM

tokens = torch.randint(3, 99, (2, 19), generator=torch.Generator().manual_seed(1))
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    single = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert weight.to_local().numel() * 2 == weight.numel()
    outputs, expected = (one(tokens, labels=tokens, use_cache=False) for one in (model, single))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    outputs.loss.backward()
    expected.loss.backward()
    for name, parameter in single.named_parameters():
        gradient = model.get_parameter(name).grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        scale = parameter.grad.abs().max()
        assert (gradient - parameter.grad).abs().max() <= 1e-4 * scale + 1e-6, (folder, name)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens, **arguments), single.generate(tokens, **arguments))
    print("agrees:", folder)
"""


def test_two_processes_agree_with_one(tmp_path):
    """The tensor-parallel plan of the original, with attention computed on every rank."""
    (tmp_path / "program.py").write_text(PARALLEL)
    folders = []
    for model_type in ("llama", "qwen3"):
        folders.append(str(tmp_path / model_type))
        make_converted_model(model_type, overrides={"vocab_size": 100}, **OPTIONS).save_pretrained(folders[-1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = os.path.dirname(os.path.dirname(gma_hf.__file__))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*command, str(tmp_path / "program.py"), *folders],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("agrees:") == 4, result.stdout
