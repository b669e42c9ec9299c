# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gma_hf import GMAForCausalLM
from gma_hf.training import (
    GMATrainer,
    GMATrainingArguments,
    NonFiniteTrainingError,
    TrainingInputError,
    find_last_checkpoint,
    mixture_parameters,
)

from ..conftest import BLOCKS, tiny_config


pytestmark = pytest.mark.quick


def training_arguments(tmp_path, cls=GMATrainingArguments, **values):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(**{**defaults, **values})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GMAForCausalLM(tiny_config(num_hidden_layers=2))


@pytest.fixture
def blocks():
    ids = torch.randint(3, 99, (12, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def group_of(optimizer, parameter):
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


@pytest.mark.parametrize("block_name", list(BLOCKS))
def test_a_stock_trainer_gives_mixtures_no_weight_decay(block_name, tmp_path):
    model = GMAForCausalLM(tiny_config(block_name))
    optimizer = Trainer(model, training_arguments(tmp_path, TrainingArguments)).create_optimizer()
    parameters = mixture_parameters(model)
    gma_layers = model.config.layer_types.count("linear_attention")
    assert len(parameters) == 3 * gma_layers
    assert all(group_of(optimizer, parameter)["weight_decay"] == 0 for parameter in parameters)
    assert group_of(optimizer, model.model.layers[0].self_attn.q_proj.weight)["weight_decay"] == 0.1


def test_without_a_rate_of_their_own_mixtures_are_treated_as_by_a_stock_trainer(model, tmp_path):
    stock = Trainer(model, training_arguments(tmp_path, TrainingArguments)).create_optimizer()
    ours = GMATrainer(model, training_arguments(tmp_path)).create_optimizer()
    assert [[id(p) for p in g["params"]] for g in ours.param_groups] == [
        [id(p) for p in g["params"]] for g in stock.param_groups
    ]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_mixtures_may_have_their_own_learning_rate(model, blocks, tmp_path, optim):
    args = training_arguments(tmp_path, mixture_learning_rate=5e-2, optim=optim, lr_scheduler_type="linear")
    trainer = GMATrainer(model, args, train_dataset=blocks)
    optimizer = trainer.create_optimizer()
    parameters = mixture_parameters(model)
    assert all(
        group_of(optimizer, p)["lr"] == 5e-2 and group_of(optimizer, p)["weight_decay"] == 0 for p in parameters
    )
    assert group_of(optimizer, model.lm_head.weight)["lr"] == 1e-3
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))

    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    before = [p.detach().clone() for p in parameters]
    trainer.add_callback(Watch())
    trainer.train()
    # Both rates follow the same linear schedule to zero
    for step, (ordinary, _, mixture) in enumerate(rates, start=1):
        assert ordinary == pytest.approx(1e-3 * (1 - step / 6))
        assert mixture == pytest.approx(5e-2 * (1 - step / 6))
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def test_a_rate_of_zero_freezes_the_mixtures_alone(model, blocks, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    GMATrainer(model, training_arguments(tmp_path, mixture_learning_rate=0.0), train_dataset=blocks).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == ("mixture_norm" in name), name


def test_a_mixture_rate_without_mixtures_is_an_error(blocks, tmp_path):
    layers = ["full_attention", "full_attention"]
    softmax = GMAForCausalLM(tiny_config(num_hidden_layers=2, layer_types=layers))
    with pytest.raises(TrainingInputError, match="no trainable mixture"):
        GMATrainer(softmax, training_arguments(tmp_path, mixture_learning_rate=1e-2)).create_optimizer()


class Poison(TrainerCallback):
    """Makes one weight NaN when a step begins or ends."""

    def __init__(self, step, event):
        self.step = step
        setattr(self, event, self.poison)

    def poison(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.model.norm.weight.data[0] = float("nan")


def all_finite(folder):
    return all(torch.isfinite(p).all() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_a_nan_loss_stops_and_names_the_last_good_checkpoint(model, blocks, tmp_path):
    trainer = GMATrainer(
        model, training_arguments(tmp_path), train_dataset=blocks, callbacks=[Poison(4, "on_step_begin")]
    )
    with pytest.raises(
        NonFiniteTrainingError, match=r"loss became nan at step 5.*last good checkpoint is .*checkpoint-4"
    ):
        trainer.train()
    assert all_finite(find_last_checkpoint(tmp_path / "out"))


def test_nan_weights_never_replace_a_good_checkpoint(model, blocks, tmp_path):
    args = training_arguments(tmp_path, save_total_limit=1)
    # Poisoned after the last step before a checkpoint: its loss was still finite
    trainer = GMATrainer(model, args, train_dataset=blocks, callbacks=[Poison(4, "on_step_end")])
    with pytest.raises(NonFiniteTrainingError, match=r"NaN or infinite weights at step 4 .*norm.*checkpoint-2"):
        trainer.train()
    assert find_last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    assert all_finite(find_last_checkpoint(tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoint-4" / "model.safetensors").exists()
    with pytest.raises(NonFiniteTrainingError, match="not saved"):
        trainer.save_model()


def test_a_nan_before_any_checkpoint_says_so(model, blocks, tmp_path):
    trainer = GMATrainer(
        model, training_arguments(tmp_path), train_dataset=blocks, callbacks=[Poison(0, "on_step_begin")]
    )
    with pytest.raises(NonFiniteTrainingError, match=r"at step 1.*No checkpoint had been saved"):
        trainer.train()


def test_only_complete_checkpoints_count(tmp_path):
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    for step, complete in ((9, True), (10, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
