# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Four rows in one batch and four accumulated batches of one row give the same update, under the stock Trainer, for every head."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

import gma_hf
from gma_hf import convert_to_gma
from gma_hf.modeling.heads_common import as_part_of_step
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import BART, ENCODER, GQA, IMAGE, SIZES


LENGTH = 9
TOKENS = torch.randint(3, 99, (4, LENGTH), generator=torch.Generator().manual_seed(0))
# Rows with 9, 7, 5 and 3 labels: a mean of means is not the mean
UNLABELLED = torch.arange(LENGTH) < torch.tensor([0, 2, 4, 6])[:, None]
LABELS = {
    "tokens": TOKENS.masked_fill(UNLABELLED, -100),
    "class of each token": (TOKENS % 3).masked_fill(UNLABELLED, -100),
    "class": torch.tensor([0, 1, 2, 1]),
    "number": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    "choice": torch.tensor([0, 2, 1, 1]),
    "tokens of each choice": torch.stack([TOKENS, TOKENS.flip(1)], 1).masked_fill(UNLABELLED[:, None], -100),
    "objects": [
        [{"class_labels": torch.tensor([i % 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1 * (i + 1)]])}]
        for i in range(4)
    ],
    "rows of 0 and 1": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
}
NATIVE = {
    "CausalLM": ("tokens", {}),
    "MaskedLM": ("tokens", {"is_causal": False}),
    "TokenClassification": ("class of each token", {"num_labels": 3}),
    "SequenceClassification": ("class", {"num_labels": 3}),
    "SequenceClassification, regression": ("number", {"num_labels": 1}),
    "SequenceClassification, several classes": ("rows of 0 and 1", {"num_labels": 3}),
    "QuestionAnswering": (None, {}),
}
SOUND = {
    **{k: v for k, v in SIZES.items() if k not in ("max_position_embeddings", "bos_token_id", "eos_token_id")},
    **{"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2},
    **{"layerdrop": 0.0, "mask_time_prob": 0.0},
}
CONVERTED = {
    "LlamaForCausalLM": ("tokens", GQA),
    "LlamaForTokenClassification": ("class of each token", {**GQA, "num_labels": 3}),
    "LlamaForSequenceClassification": ("class", {**GQA, "num_labels": 3}),
    "LlamaForQuestionAnswering": (None, GQA),
    "GPT2LMHeadModel": ("tokens", {**SIZES}),
    "GPT2ForSequenceClassification": (
        "class",
        {**SIZES, "num_labels": 3},
    ),
    "BertForMaskedLM": ("tokens", ENCODER),
    "BertForTokenClassification": ("class of each token", {**ENCODER, "num_labels": 3}),
    "BertForSequenceClassification": ("rows of 0 and 1", {**ENCODER, "num_labels": 3}),
    "BertForQuestionAnswering": (None, ENCODER),
    "BertForNextSentencePrediction": ("class", {**ENCODER, "num_labels": 3}),
    "BertForMultipleChoice": ("choice", ENCODER),
    "GPT2DoubleHeadsModel": ("tokens of each choice", SIZES),
    "ViTForImageClassification": ("class", {**IMAGE, "num_labels": 3}),
    "Wav2Vec2ForCTC": ("tokens", SOUND),
    "Wav2Vec2ForCTC, mean over rows": ("tokens", {**SOUND, "ctc_loss_reduction": "mean"}),
    "YolosForObjectDetection": (
        "objects",
        {**IMAGE, "image_size": [8, 8], "num_detection_tokens": 4, "num_labels": 3},
    ),
    "BartForConditionalGeneration": ("tokens", {**BART, "dropout": 0.0}),
}


def rows_of(kind, main_input="input_ids"):
    rows = []
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        row = {"input_ids": TOKENS[index], "attention_mask": torch.ones(LENGTH, dtype=torch.long)}
        if main_input == "pixel_values":
            row = {"pixel_values": torch.randn(3, 8, 8, generator=generator)}
        if main_input == "input_values":
            row = {"input_values": torch.randn(200, generator=generator)}
        if kind in ("choice", "tokens of each choice"):
            choices = [TOKENS[index], TOKENS[index].flip(0), TOKENS[index].roll(1)]
            row = {"input_ids": torch.stack(choices if kind == "choice" else choices[:2])}
        if kind is None:
            row |= {"start_positions": torch.tensor(index), "end_positions": torch.tensor(index + 3)}
        else:
            is_pair = kind == "class" and main_input == "input_ids"
            row["labels"] = LABELS[kind][index] % 2 if is_pair else LABELS[kind][index]
        rows.append(row)
    return rows


def batch_of(rows):
    """A batch; objects to detect stay a list."""
    batch = {}
    for name, first in rows[0].items():
        column = [row[name] for row in rows]
        batch[name] = [x for objects in column for x in objects] if isinstance(first, list) else torch.stack(column)
    return batch


def converted(name):
    """A converted model and four rows for it."""
    kind, arguments = CONVERTED[name]
    model_class = getattr(transformers, name.split(",")[0])
    torch.manual_seed(0)
    model = convert_to_gma(model_class(model_class.config_class(**arguments)), num_components=6)
    return model, rows_of(kind, model.main_input_name)


def gradient(model, rows, tmp_path, batch_size, accumulation):
    """What one step of gradient descent at a rate of one subtracts from the weights."""
    model = copy.deepcopy(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=batch_of).train()
    return torch.cat([(b - p.detach()).flatten() for p, b in zip(model.parameters(), before, strict=True)])


def mean_over_all_labels(model, rows):
    """The gradient of the loss that the head gives all rows at once, without any Trainer."""
    model = copy.deepcopy(model).train()
    model(**batch_of(rows)).loss.backward()
    zero = torch.zeros
    return torch.cat([(zero(p.shape) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def expect_the_same_update(model, rows, tmp_path):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = mean_over_all_labels(model, rows)
    assert expected.norm() > 1e-3
    # Differences of float32 weights of order one, and sums in another order
    tolerance = {"rtol": 1e-3, "atol": 1e-5 * max(1.0, expected.abs().max().item())}
    whole = gradient(model, rows, tmp_path, 4, 1)
    accumulated = gradient(model, rows, tmp_path, 1, 4)
    torch.testing.assert_close(accumulated, whole, **tolerance)
    torch.testing.assert_close(whole, expected, **tolerance)


@pytest.mark.quick
@pytest.mark.parametrize("name", list(NATIVE))
def test_native_heads(name, tmp_path):
    kind, overrides = NATIVE[name]
    model = make_model(getattr(gma_hf, f"GMAFor{name.split(',')[0]}"), tiny_config("gated", **overrides))
    expect_the_same_update(model, rows_of(kind), tmp_path)


@pytest.mark.parametrize("name", list(CONVERTED))
def test_heads_of_converted_models(name, tmp_path):
    expect_the_same_update(*converted(name), tmp_path)


def test_a_loss_over_two_kinds_of_labels_is_not_accumulated():
    """The number of tokens that a step predicts does not tell how many pairs of sentences it has."""
    torch.manual_seed(0)
    model = convert_to_gma(transformers.BertForPreTraining(transformers.BertConfig(**ENCODER)), num_components=6)
    batch = {"input_ids": TOKENS, "labels": LABELS["tokens"], "next_sentence_label": LABELS["class"] % 2}
    number = LABELS["tokens"].ne(-100).sum()
    whole = model(**batch, num_items_in_batch=number).loss
    torch.testing.assert_close(whole, model(**batch).loss)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1"):
        model(**batch, num_items_in_batch=2 * number)


def without_labels(row: dict) -> dict:
    """The row, its labels ignored, or its answer behind the end of the text."""
    empty = {name: torch.full_like(x, -100) for name, x in row.items() if name == "labels"}
    return row | empty | {name: torch.tensor(512) for name in row if name.endswith("_positions")}


# Numbers, rows of 0 and 1, and lists have no value for "no label"; choices and CTC always have one
IGNORABLE = [name for name, (kind, _) in NATIVE.items() if kind not in ("number", "rows of 0 and 1")]
IGNORABLE_CONVERTED = [
    name
    for name, (kind, _) in CONVERTED.items()
    if kind not in ("rows of 0 and 1", "choice", "objects") and "CTC" not in name
]


def head(name: str):
    """A native or converted model, and four rows for it."""
    if name in NATIVE:
        kind, overrides = NATIVE[name]
        return make_model(getattr(gma_hf, f"GMAFor{name}"), tiny_config("gated", **overrides)), rows_of(kind)
    return converted(name)


@pytest.mark.parametrize("name", [*IGNORABLE, *IGNORABLE_CONVERTED])
def test_a_batch_without_any_label_adds_nothing(name):
    """Alone or as a part of a step that has no label at all; the mean over nothing, NaN, would spread over all weights."""
    model, rows = head(name)
    model.train()
    empty = [without_labels(row) for row in rows]
    batch = batch_of(empty)
    steps = [{}] if "labels" not in batch else [{}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}]
    for step in steps:
        for options in ({}, {"return_dict": False}):
            model.zero_grad()
            loss = model(**batch, **step, **options)[0]
            loss.backward()
            assert loss.item() == 0.0
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    # As a mean over batches has it: a 0 would flatter the model
    assert model.eval()(**batch).loss.isnan()


@pytest.mark.parametrize("name", ["TokenClassification", "QuestionAnswering", "CausalLM", "BertForQuestionAnswering"])
def test_accumulation_passes_over_a_batch_without_labels(name, tmp_path):
    model, rows = head(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mixed = [*rows[:3], without_labels(rows[3])]
    expected = gradient(model, rows[:3], tmp_path, 3, 1)
    if "labels" not in rows[0]:
        # Trainer does not count answers, and divides by the number of batches
        with pytest.raises(ValueError, match="a mean over labels, of which the rows have different numbers"):
            gradient(model, mixed, tmp_path, 1, 4)
        torch.testing.assert_close(gradient(model, mixed, tmp_path, 4, 1), expected, rtol=1e-3, atol=1e-5)
        return
    accumulated = gradient(model, mixed, tmp_path, 1, 4)
    torch.testing.assert_close(accumulated, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["CausalLM", "MaskedLM", "QuestionAnswering", "BertForMaskedLM"])
def test_a_step_without_labels_changes_no_weight(name, tmp_path):
    model, rows = head(name)
    change = gradient(model, [without_labels(row) for row in rows], tmp_path, 2, 2)
    assert not change.any()


def test_a_head_keeps_its_signature_and_its_outputs():
    class Head(nn.Module):
        def forward(self, input_ids=None, labels=None, return_dict=None):
            return (labels.float().mean(), input_ids)

    wrapped = type("Wrapped", (Head,), {"forward": as_part_of_step(Head.forward)})()
    wrapped.loss_type, wrapped.config = "ForTokenClassification", AutoModel
    wrapped.eval()
    labels = torch.tensor([2, 4])
    assert wrapped(None, labels)[0] == 3.0
    assert wrapped(None, labels, num_items_in_batch=4)[0] == 1.5
    assert wrapped(labels=labels, num_items_in_batch=torch.tensor(4))[0] == 1.5
