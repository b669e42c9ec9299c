# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import logging
import math

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gma_hf import GMAForCausalLM
from gma_hf.training import GMATrainer, MixtureHealthCallback, measure_mixture_health
from gma_hf.training.callbacks import MixtureHealth

from ..conftest import BLOCKS, TINY, make_model, tiny_config
from .test_trainer import blocks, training_arguments  # noqa: F401 (a fixture)


NAMES = {"mixture/usage_perplexity", "mixture/usage_perplexity_min", "mixture/entropy", "mixture/dead_components"}


def health_of(responsibilities):
    """Health from responsibilities `[tokens, C]` of one head."""
    entropy = torch.special.entr(responsibilities).sum()
    return MixtureHealth.from_sums(
        responsibilities.sum(0)[None], entropy[None], torch.tensor(float(len(responsibilities)))
    )


def test_measures_of_mixtures_that_are_known():
    hard = health_of(torch.eye(8))
    assert hard.usage_perplexity.item() == pytest.approx(8)
    assert hard.entropy.item() == 0
    assert hard.dead_components.item() == 0
    undecided = health_of(torch.full((5, 8), 1 / 8))
    assert undecided.usage_perplexity.item() == pytest.approx(8)
    assert undecided.entropy.item() == pytest.approx(math.log(8))
    collapsed = health_of(torch.eye(8)[:1].repeat(5, 1))
    assert collapsed.usage_perplexity.item() == pytest.approx(1)
    assert collapsed.dead_components.item() == 7
    assert collapsed.collapsed
    assert not hard.collapsed and not undecided.collapsed
    assert not health_of(torch.ones(3, 1)).collapsed  # one component alone cannot collapse


@pytest.mark.parametrize("block_name", list(BLOCKS))
def test_health_is_that_of_the_routed_keys_of_real_tokens(block_name):
    model = make_model(GMAForCausalLM, tiny_config(block_name))
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = measure_mixture_health(model, {"input_ids": ids})
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    mask = (torch.arange(17) < 12).long().expand(2, -1)
    real = measure_mixture_health(model, {"input_ids": padded, "attention_mask": mask})
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]
    assert [name.split(".")[2] for name in whole] == [str(i) for i in layers]
    for name, health in whole.items():
        assert health.usage.shape == (4, 6) and health.usage_perplexity.shape == health.entropy.shape == (4,)
        assert (health.entropy < health.usage_perplexity.log() + 1e-5).all()  # entropy is concave
        torch.testing.assert_close(health.usage.sum(-1), torch.ones(4))
        # Sums of float32 in another order
        torch.testing.assert_close(real[name].usage, health.usage, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(real[name].entropy, health.entropy, rtol=1e-5, atol=1e-6)


def evaluate(model, tmp_path, blocks, **values):  # noqa: F811
    trainer = GMATrainer(model, training_arguments(tmp_path, **values), train_dataset=blocks, eval_dataset=blocks)
    return trainer, trainer.evaluate()


def test_health_is_logged_at_evaluations(tmp_path, blocks):  # noqa: F811
    model = make_model(GMAForCausalLM, tiny_config())
    trainer, metrics = evaluate(model, tmp_path, blocks)
    assert {f"eval_{name}" for name in NAMES} <= set(metrics)
    assert 1 <= metrics["eval_mixture/usage_perplexity_min"] <= metrics["eval_mixture/usage_perplexity"] <= 6
    assert any(set(entry) >= NAMES for entry in trainer.state.log_history)
    assert {f"test_{name}" for name in NAMES} <= set(trainer.evaluate(metric_key_prefix="test"))


def test_health_is_logged_while_training_on_request(tmp_path, blocks):  # noqa: F811
    trainer = GMATrainer(
        GMAForCausalLM(tiny_config()), training_arguments(tmp_path, mixture_health_steps=3), train_dataset=blocks
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "mixture/entropy" in entry] == [3, 6]


def test_a_collapsed_layer_is_warned_of_once(tmp_path, blocks, caplog):  # noqa: F811
    model = make_model(GMAForCausalLM, tiny_config())
    with torch.no_grad():
        model.model.layers[1].self_attn.mixture_norm.prior_logits[:, 2] = 100.0  # its component always wins
    with caplog.at_level(logging.WARNING, logger="gma_hf"):
        trainer, metrics = evaluate(model, tmp_path, blocks)
        trainer.evaluate()
    (warning,) = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert "model.layers.1.self_attn.mixture_norm" in warning
    assert "1.00 of 6 components" in warning
    assert metrics["eval_mixture/dead_components"] >= 4 * 5


def test_the_report_changes_nothing(tmp_path, blocks):  # noqa: F811
    def losses(**values):
        torch.manual_seed(0)
        model = GMAForCausalLM(tiny_config(hidden_dropout=0.2))
        values = {"bf16": True, "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2, **values}
        trainer, _ = evaluate(model, tmp_path, blocks, **values)
        if "mixture_health_steps" not in values:
            trainer.remove_callback(MixtureHealthCallback)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()

    reported, reported_weights = losses(mixture_health_steps=1)
    silent, silent_weights = losses()
    assert reported == silent
    assert all(torch.equal(reported_weights[name], weight) for name, weight in silent_weights.items())


def test_a_compiled_model_is_measured_uncompiled():
    model = make_model(GMAForCausalLM, tiny_config())
    ids = torch.randint(3, 99, (2, 12))
    expected = measure_mixture_health(model, {"input_ids": ids})

    def refuse(graph, example_inputs):
        raise AssertionError("the model was compiled")

    model.forward = torch.compile(model.forward, backend=refuse)
    measured = measure_mixture_health(model, {"input_ids": ids})
    assert all(torch.equal(measured[name].usage, health.usage) for name, health in expected.items())


def test_models_without_mixtures_are_left_alone(tmp_path, blocks):  # noqa: F811
    config = LlamaConfig(
        **{name: value for name, value in TINY.items() if name != "num_components"}, num_key_value_heads=4
    )
    _, metrics = evaluate(LlamaForCausalLM(config), tmp_path, blocks)
    assert not any("mixture" in name for name in metrics)


def test_the_callback_serves_a_stock_trainer_too(tmp_path, blocks):  # noqa: F811
    args = training_arguments(tmp_path, TrainingArguments)
    trainer = Trainer(GMAForCausalLM(tiny_config()), args, eval_dataset=blocks)
    trainer.add_callback(MixtureHealthCallback(trainer))
    assert "eval_mixture/entropy" in trainer.evaluate()


@pytest.mark.parametrize("kind", ["Python lists", "tensors", "read once"])
def test_a_streaming_data_set_is_evaluated_like_one_in_memory(tmp_path, blocks, kind):  # noqa: F811
    model = make_model(GMAForCausalLM, tiny_config())
    rows = datasets.Dataset.from_list([{name: row.tolist() for name, row in block.items()} for block in blocks])
    stream = rows.to_iterable_dataset()
    if kind == "tensors":
        stream = stream.with_format("torch")
    if kind == "read once":
        stream = ReadOnce(rows)
    expected = GMATrainer(model, training_arguments(tmp_path), eval_dataset=rows).evaluate()
    found = GMATrainer(model, training_arguments(tmp_path), eval_dataset=stream).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    for name in NAMES if kind != "read once" else ():
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)


class ReadOnce(torch.utils.data.IterableDataset):
    """A stream that is its own iterator: whoever reads from it takes examples away."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


def test_training_on_a_stream_misses_no_example(tmp_path, blocks):  # noqa: F811
    seen = []

    class Watching(GMATrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, *args, **kwargs)

    arguments = training_arguments(tmp_path, mixture_health_steps=1, save_strategy="no")
    Watching(GMAForCausalLM(tiny_config()), arguments, train_dataset=ReadOnce(blocks)).train()
    assert torch.equal(torch.cat(seen), torch.stack([block["input_ids"] for block in blocks]))
