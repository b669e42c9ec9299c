# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A converted model learns to be what it was, stage by stage."""

import json
import math
import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gma_hf import convert_to_gma, gma_layers
from gma_hf.conversion.calibration.teacher import as_teacher
from gma_hf.conversion.distillation.arguments import GMADistillationArguments
from gma_hf.conversion.distillation.losses import attention_distance, hidden_distance, kl_divergence, real_tokens
from gma_hf.conversion.distillation.stages import distill
from gma_hf.conversion.distillation.trainer import GMADistillationTrainer
from tests.conversion.tiny_models import make_softmax_model, output_of


quick = pytest.mark.quick


def examples(count=24, length=24, seed=5, **extra):
    rows = torch.randint(3, 99, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, **{name: row.clone() for name in extra}} for row in rows]


def original(model_type="llama", **overrides):
    """A tiny model whose attention is far from the uniform one that every mixture can do."""
    model = make_softmax_model(model_type, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "query.weight", "attention.output.dense.weight")):
                parameter.mul_(8.0)
    return model


def student(model_type="llama", window_size=4, **options):
    return convert_to_gma(original(model_type), num_components=8, window_size=window_size, **options)


def arguments(tmp_path, stage="distillation", **options):
    values = {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1}
    values.update(save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant")
    return GMADistillationArguments(output_dir=str(tmp_path), stage=stage, **{**values, **options})


def trainer(model, args, **options):
    data = {"train_dataset": examples(), "eval_dataset": examples(8, seed=6)}
    return GMADistillationTrainer(model, args, **{**data, **options})


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def naive_kl(student_logits, teacher_logits, temperature=1.0):
    log_student, log_teacher = ((x / temperature).log_softmax(dim=-1) for x in (student_logits, teacher_logits))
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(dim=-1) * temperature**2


@quick
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_chunked_divergence_and_its_gradient_are_those_of_autograd(monkeypatch, temperature):
    # Chunks of two rows, the last one shorter
    monkeypatch.setattr("gma_hf.conversion.distillation.losses.LARGEST_CHUNK", 2 * 11)
    generator = torch.Generator().manual_seed(0)
    leaf, teacher = (3 * torch.randn(3, 3, 11, generator=generator) for _ in range(2))
    weights = torch.rand(3, 3, generator=generator)
    leaf.requires_grad_()
    expected = (naive_kl(leaf, teacher, temperature) * weights).sum()
    (expected_gradient,) = torch.autograd.grad(expected * 3.0, leaf)
    value = kl_divergence(leaf * 1.0, teacher, weights, temperature)
    (gradient,) = torch.autograd.grad(value * 3.0, leaf)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert kl_divergence(teacher, teacher, weights).item() == pytest.approx(0.0, abs=1e-5)


def test_nobody_reads_logits_that_were_overwritten():
    leaf = torch.randn(4, 7, requires_grad=True)
    logits = leaf.exp()  # keeps its output for the backward pass
    value = kl_divergence(logits, torch.randn(4, 7), torch.ones(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@quick
def test_a_layers_gradient_is_computed_as_autograd_would():
    model = student()
    batch = torch.stack([row["input_ids"] for row in examples(4)])
    layers = gma_layers(model)
    collected = []
    with as_teacher(model, collected.append), torch.no_grad():
        model(batch, use_cache=False)
    expected = {}
    for call in collected:
        parameters = dict(call.layer.named_parameters())
        grads = torch.autograd.grad(attention_distance(call) / len(layers), list(parameters.values()))
        expected[call.layer] = dict(zip(parameters, grads, strict=True))
    run = trainer(model, arguments("unused", "attention_transfer"))
    model.train()
    loss, _ = run.compute_loss(model, {"input_ids": batch}, return_outputs=True)
    loss.backward()
    assert model.training
    for layer, gradients in expected.items():
        for name, gradient in gradients.items():
            torch.testing.assert_close(layer.get_parameter(name).grad, gradient)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".gma." not in name)


@quick
def test_attention_transfer_lowers_the_error_and_trains_only_what_is_new(tmp_path):
    model = student(use_routing_projections=True)
    old = {name: p.clone() for name, p in model.named_parameters() if ".gma." not in name}
    run = trainer(model, arguments(tmp_path, "attention_transfer", learning_rate=1e-2, max_steps=25))
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_attention_error"] < 0.7 * before["eval_attention_error"]
    assert after["eval_kl"] < before["eval_kl"]
    for name, parameter in old.items():
        assert torch.equal(model.get_parameter(name), parameter)


@quick
def test_distillation_lowers_the_divergence(tmp_path):
    model, teacher = student(), original("llama")
    args = arguments(tmp_path, learning_rate=1e-4, gma_learning_rate=1e-2, hidden_weight=0.1, max_steps=40)
    run = trainer(model, args, teacher=teacher)
    before = run.evaluate()
    run.train()
    rates = {group["lr"] for group in run.optimizer.param_groups if group["params"]}
    assert rates == {1e-4, 1e-2}
    after = run.evaluate()
    assert after["eval_kl"] < 0.7 * before["eval_kl"]
    assert after["eval_loss"] == pytest.approx(after["eval_kl"], rel=1e-4)


def test_evaluation_is_exact_over_batches_of_any_size(tmp_path):
    model, teacher = student(), original("llama")
    lengths = (24, 9, 13, 24, 2, 17, 20)
    data = [{"input_ids": row["input_ids"][:length]} for row, length in zip(examples(7), lengths, strict=True)]

    def collate(rows):
        tokens = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}

    args = arguments(tmp_path, per_device_eval_batch_size=3)
    metrics = trainer(model, args, teacher=teacher, eval_dataset=data, data_collator=collate).evaluate()
    divergence = nll = num_tokens = num_predicted = 0
    for row in data:
        tokens = row["input_ids"][None]
        logits, target = output_of(model, input_ids=tokens), output_of(teacher, input_ids=tokens)
        divergence += naive_kl(logits, target).sum().item()
        nll += F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum").item()
        num_tokens, num_predicted = num_tokens + tokens.numel(), num_predicted + tokens.numel() - 1
    assert metrics["eval_kl"] == pytest.approx(divergence / num_tokens, rel=1e-3)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / num_predicted), rel=1e-3)


@pytest.mark.parametrize("stage", ["attention_transfer", "distillation"])
def test_accumulated_batches_count_by_their_tokens(tmp_path, stage):
    data = [{"input_ids": row["input_ids"]} for row in examples(4)]
    lengths = (24, 7, 15, 20)

    def collate(rows):
        tokens = torch.stack([row["input_ids"] for row in rows])
        kept = torch.tensor(
            [lengths[[torch.equal(row["input_ids"], d["input_ids"]) for d in data].index(True)] for row in rows]
        )
        mask = (torch.arange(24) < kept[:, None]).long()
        return {"input_ids": tokens * mask, "attention_mask": mask}

    def trained(batch_size, accumulation):
        model = student()
        options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "max_steps": 1}
        args = arguments(
            tmp_path,
            stage,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        run = trainer(model, args, teacher=original("llama"), train_dataset=data, data_collator=collate)
        run.train()
        return run, model

    (whole, model), (parts, other) = trained(4, 1), trained(1, 4)
    if stage == "distillation":
        # Exact: the mean over all tokens. (The error of an attention is a ratio, so that its parts are weighted means)
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
        for parameter, expected in zip(other.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-5)
    else:
        # The ratios of short and long texts differ, by less than the spread of the texts themselves
        assert losses(parts) == pytest.approx(losses(whole), rel=0.5)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}, {"torch_compile": True}])
@pytest.mark.parametrize("stage", ["attention_transfer", "distillation"])
def test_precision_checkpointing_and_compilation_are_flags(tmp_path, stage, options):
    if "torch_compile" in options:
        # The eager backend traces without calling a compiler, which would take minutes
        options = {**options, "torch_compile_backend": "eager"}
    plain = trainer(student(), arguments(tmp_path, stage, max_steps=3), teacher=original("llama"))
    plain.train()
    run = trainer(student(), arguments(tmp_path, stage, max_steps=3, **options), teacher=original("llama"))
    run.train()
    # bfloat16 has eight bits; the rest changes nothing but the order of sums
    tolerance = 0.1 if "bf16" in options else 1e-3
    assert losses(run) == pytest.approx(losses(plain), rel=tolerance)


def test_every_stage_has_the_precision_that_it_asks_for(tmp_path):
    model, seen = student(), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    for bf16 in (True, True, False):
        seen.clear()
        trainer(model, arguments(tmp_path, "attention_transfer", max_steps=1, bf16=bf16)).train()
        assert seen[0] == (torch.bfloat16 if bf16 else torch.float32)


def test_a_model_whose_old_weights_are_frozen_is_its_own_teacher(tmp_path):
    def run(**options):
        run = trainer(student(), arguments(tmp_path, trainable="", max_steps=3), **options)
        run.train()
        return run

    alone = run()
    assert losses(alone) == pytest.approx(losses(run(teacher=original("llama"))), rel=1e-3)
    frozen = [name for name, parameter in alone.model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(".gma." not in name for name in frozen)


def test_a_pattern_chooses_what_else_is_trained(tmp_path):
    model = student()
    trainer(model, arguments(tmp_path, trainable=r"layers\.1\..*(q|k)_proj"), teacher=original("llama"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".gma." not in name}
    assert trained == {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk"}


def test_an_encoder_without_logits_aligns_its_embeddings(tmp_path):
    model, teacher = student("bert", window_size=0).base_model, original("bert").base_model
    options = {"logits_weight": 0.0, "hidden_weight": 1.0, "hidden_kind": "cosine", "embedding_weight": 1.0}
    options.update(trainable="", learning_rate=1e-2)
    run = trainer(model, arguments(tmp_path, max_steps=30, **options), teacher=teacher)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    for name in ("eval_hidden_cosine", "eval_embedding_cosine"):
        assert 1 - after[name] < 0.8 * (1 - before[name])
    with pytest.raises(ValueError, match=r"no logits to distil\. Set `logits_weight=0`"):
        trainer(model, arguments(tmp_path), teacher=teacher).train()


def test_hidden_distances_do_not_let_huge_tokens_decide():
    teacher = torch.ones(1, 2, 4)
    teacher[0, 0] = 1000.0
    student_states = teacher * torch.tensor([1.01, 2.0])[None, :, None]
    weights = torch.full((1, 2), 0.5)
    assert hidden_distance([student_states], [teacher], weights, "mse").item() == pytest.approx(0.5 + 5e-5, rel=1e-3)
    assert hidden_distance([student_states], [teacher], weights, "cosine").item() == pytest.approx(0.0, abs=1e-6)


def test_sequence_to_sequence_models_count_the_tokens_of_the_decoder(tmp_path):
    labels = torch.tensor([[5, 6, 7], [5, -100, -100]])
    inputs = {
        "input_ids": torch.ones(2, 9),
        "attention_mask": torch.ones(2, 9),
        "decoder_input_ids": labels,
        "labels": labels,
    }
    assert real_tokens(inputs, (2, 3)).sum() == 4
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][:6]} for row in examples()]
    model, teacher = student("bart", layers=["decoder"], window_size=0), original("bart")
    args = arguments(tmp_path, max_steps=20, trainable="", learning_rate=1e-2)
    run = trainer(model, args, teacher=teacher, train_dataset=data, eval_dataset=data[:8])
    before = run.evaluate()["eval_kl"]
    run.train()
    assert run.evaluate()["eval_kl"] < before


def stages(tmp_path, **options):
    options = {"save_strategy": "steps", "save_steps": 3, **options}
    return [arguments(tmp_path, "attention_transfer", **options), arguments(tmp_path, "distillation", **options)]


def run_stages(folder, given, **options):
    model = student()
    options = {"train_dataset": examples(), "eval_dataset": examples(8, seed=6), **options}
    return model, distill(model, given, folder, teacher=original("llama"), **options)


def test_a_run_that_was_interrupted_ends_as_if_it_was_not(tmp_path):
    whole, results = run_stages(tmp_path / "whole", stages(tmp_path))
    assert [result.stage for result in results] == ["attention_transfer", "distillation"]
    assert results[1].metrics["eval_kl"] < results[0].metrics["eval_kl"]
    assert all(parameter.requires_grad for parameter in whole.parameters())

    # Interrupted in the second stage: its model and its end are missing
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    second = tmp_path / "cut" / "2-distillation"
    for path in list(second.iterdir()):
        if path.name not in ("checkpoint-3", "run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = tmp_path / "cut" / "distillation_state.json"
    state.write_text(json.dumps(json.loads(state.read_text())[:1]))
    resumed, again = run_stages(tmp_path / "cut", stages(tmp_path))
    assert [result.steps for result in again] == [6, 6]
    for parameter, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)

    # Finished: nothing is trained, the weights come from the folder
    finished, third = run_stages(tmp_path / "whole", stages(tmp_path), train_dataset=None)
    assert third == results
    batch = examples(4)[0]["input_ids"][None]
    assert torch.equal(output_of(finished, input_ids=batch), output_of(whole, input_ids=batch))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "2-distillation")
    assert torch.equal(output_of(loaded.eval(), input_ids=batch), output_of(whole.eval(), input_ids=batch))

    with pytest.raises(ValueError, match="finished the stages attention_transfer, distillation, but asked for"):
        run_stages(tmp_path / "whole", stages(tmp_path)[1:])
    changed = stages(tmp_path)
    changed[0].learning_rate = 1.0
    with pytest.raises(
        ValueError, match=r"1-attention_transfer holds another run: --learning_rate was .* and is 1\.0"
    ):
        run_stages(tmp_path / "whole", changed)


def test_fine_tuning_with_adapters_ends_in_a_plain_converted_model(tmp_path):
    from peft import LoraConfig

    model = student()
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["mixture_norm"])
    data = examples(labels=True)
    args = arguments(tmp_path, "finetune", learning_rate=1e-2, max_steps=20)
    ids = torch.stack([row["input_ids"] for row in data])
    start = model(ids, labels=ids).loss.item()
    results = distill(model, [args], tmp_path / "run", peft_config=adapters, train_dataset=data, eval_dataset=data)
    assert start == pytest.approx(math.log(99), abs=0.3)  # nats: it begins with a uniform guess
    # What is reported is the loss of the model that is left
    assert results[0].metrics["eval_loss"] == pytest.approx(model.eval()(ids, labels=ids).loss.item(), rel=1e-4)
    assert results[0].metrics["eval_loss"] < start - 0.1
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "1-finetune").eval()
    batch = data[0]["input_ids"][None]
    torch.testing.assert_close(output_of(loaded, input_ids=batch), output_of(model.eval(), input_ids=batch))


@quick
def test_teacher_and_student_must_speak_of_the_same_tokens(tmp_path):
    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: index for index, word in enumerate(self.words)}

    model = student()
    with pytest.raises(ValueError, match="knows 99 tokens and the teacher 55"):
        trainer(model, arguments(tmp_path), teacher=original("llama", vocab_size=55))
    teacher = original("llama")
    with pytest.raises(ValueError, match="tokenizer differs"):
        trainer(
            model,
            arguments(tmp_path),
            teacher=teacher,
            processing_class=Words("a", "b"),
            teacher_processing_class=Words("b", "a"),
        )


@quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "transfer"}, "`stage` is 'transfer'; it must be one of 'attention_transfer'"),
        ({"hidden_kind": "l1"}, "`hidden_kind` is 'l1'"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"logits_weight": 0.0}, "nothing to learn"),
        ({"hidden_weight": -1.0}, "must not be negative"),
        ({"trainable": "("}, "no regular expression"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


@quick
def test_what_cannot_be_distilled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no converted layers"):
        trainer(make_softmax_model("llama"), arguments(tmp_path))
    with pytest.raises(ValueError, match="cannot be its own teacher"):
        trainer(student(), arguments(tmp_path))
