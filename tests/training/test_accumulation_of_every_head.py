# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Every head that Transformers has for an architecture that converts: four accumulated batches of one row give the update of one batch of
four rows, or the head says before the first step that it cannot. The stock `Trainer` counts the labels and divides the losses.
"""

import inspect

import pytest
import torch
import transformers
from accelerate.state import GradientState
from torch import nn
from transformers import Trainer, TrainingArguments

from gma_hf import convert_to_gma
from gma_hf.compat import auto_classes_of
from tests.conversion.tiny_models import ENCODER, FAMILIES, IMAGE, SIZES
from tests.training.test_gradient_accumulation import CONVERTED, LABELS, LENGTH, TOKENS, UNLABELLED, batch_of


TOWERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = {
    "text_config": {
        **TOWERS,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "eos_token_id": 98,
        "projection_dim": 16,
    },
    "vision_config": {**TOWERS, "image_size": 8, "patch_size": 2, "projection_dim": 16},
    "projection_dim": 16,
}
CONFIGS = {
    **{model_type: FAMILIES[model_type] for model_type in FAMILIES},
    "albert": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "bert-generation": ("BertGenerationDecoder", {**SIZES, "is_decoder": True}),
    "clip": ("CLIPModel", CLIP),
    "data2vec-audio": ("Data2VecAudioForCTC", {
        **CONVERTED["Wav2Vec2ForCTC"][1], "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 3,
        "xvector_output_dim": 8, "tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1),
    }),
    "wav2vec2": ("Wav2Vec2ForCTC", {
        **CONVERTED["Wav2Vec2ForCTC"][1], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        "xvector_output_dim": 8, "tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1),
        "num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8, "num_negatives": 3,
    }),
    "vit_mae": ("ViTMAEForPreTraining", {**IMAGE, "decoder_hidden_size": 32, "decoder_intermediate_size": 48,
                "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}),
    "yolos": ("YolosForObjectDetection", {**IMAGE, "image_size": [8, 8], "num_detection_tokens": 4}),
    "dpt": ("DPTForSemanticSegmentation", {
        **IMAGE, "image_size": 16, "patch_size": 4, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8, "is_hybrid": False, "num_labels": 3,
    }),
}  # fmt: skip
LOSS_ARGUMENTS = {"labels", "start_positions", "return_loss", "mask_time_indices", "bool_masked_pos"}
# Heads with other losses refuse: two means, rows that are compared with each other, sums over masked frames
REFUSED = {"BertForPreTraining", "AlbertForPreTraining", "CLIPModel", "Wav2Vec2ForPreTraining"}
# The numbers of patches and of objects differ from row to row, and nobody counts them
REFUSED_WITH_OTHER_NUMBERS = {"ViTForMaskedImageModeling", "DeiTForMaskedImageModeling", "YolosForObjectDetection"}
# They compute no loss, or none yet
WITHOUT_LOSS = {"ViTModel", "DeiTModel", "Dinov2Model", "Data2VecAudioModel", "Wav2Vec2Model", "DPTForDepthEstimation"}


def heads():
    """The heads with a loss, each with a configuration of its architecture."""
    found = {}
    for class_name, arguments in CONFIGS.values():
        config_class = getattr(transformers, class_name).config_class
        classes = {*auto_classes_of(config_class).values(), getattr(transformers, class_name)}
        for model_class in classes:
            name = model_class.__name__
            has_loss = LOSS_ARGUMENTS & set(inspect.signature(model_class.forward).parameters)
            if (has_loss or name.endswith("MAEForPreTraining")) and name not in WITHOUT_LOSS:
                found[name] = arguments
    return found


HEADS = heads()


def make(name: str):
    """A converted model without dropout, in training."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = model_class.config_class(**HEADS[name])
    for attribute, value in vars(config).items():
        if "drop" in attribute and isinstance(value, float):
            setattr(config, attribute, 0.0)
    if "image_size" in HEADS[name] and hasattr(config, "encoder_stride"):
        config.encoder_stride = config.patch_size
    if name == "Wav2Vec2ForPreTraining":
        config.mask_time_prob = 0.05  # without which it has no embedding of masked frames
    model = convert_to_gma(model_class(config), num_components=4)
    for parent in list(model.modules()):
        for child, module in parent.named_children():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.BatchNorm2d):  # whose statistics are those of a batch
                setattr(parent, child, nn.Identity())
    return model


def inputs_of(model) -> dict:
    """Four rows without labels."""
    generator, names = torch.Generator().manual_seed(1), inspect.signature(model.forward).parameters
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 8)
    size = size if isinstance(size, list | tuple) else (size, size)
    pixels = {"pixel_values": torch.randn(4, 3, *size, generator=generator)}
    if "return_loss" in names:
        return {"input_ids": TOKENS, **pixels}
    if model.main_input_name == "pixel_values":
        return pixels
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(4, 200, generator=generator)}
    if "input_features" in names:
        return {"input_features": torch.randn(4, 8, 24, generator=generator)}
    tokens = TOKENS.clone()
    if model.config.model_type == "gma_bart":
        tokens[:, -1] = model.config.eos_token_id  # at which its classifier reads
    return {"input_ids": tokens, "attention_mask": torch.ones_like(TOKENS)}


def labels_of(model, inputs: dict) -> dict:
    """Labels of four rows, of which the rows have different numbers where labels can be ignored."""
    name, names = type(model).__name__, inspect.signature(type(model).forward).parameters
    if "return_loss" in names:
        return {"return_loss": True}
    if "mask_time_indices" in names:
        frames = model.wav2vec2.feature_extractor(inputs["input_values"]).shape[-1]
        masked = torch.arange(frames) < torch.tensor([9, 7, 5, 3])[:, None]
        negatives = torch.arange(4)[:, None, None] * frames + torch.arange(3).expand(4, frames, 3)
        negatives = negatives - negatives.min(dim=1, keepdim=True).values
        return {"mask_time_indices": masked, "sampled_negative_indices": negatives}
    if "bool_masked_pos" in names:
        return {"bool_masked_pos": torch.arange(16) < torch.tensor([9, 7, 5, 3])[:, None]}
    if name.endswith("MAEForPreTraining"):
        return {"noise": torch.rand(4, 16, generator=torch.Generator().manual_seed(2))}
    if "start_positions" in names:
        return {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([3, 4, 5, 6])}
    if name.endswith("ObjectDetection"):
        boxes = [torch.rand(i + 1, 4, generator=torch.Generator().manual_seed(i)) * 0.4 + 0.1 for i in range(4)]
        return {"labels": [[{"class_labels": torch.zeros(len(box), dtype=torch.long), "boxes": box}] for box in boxes]}
    if name.endswith("SemanticSegmentation"):
        return {"labels": torch.randint(0, 3, (4, 16, 16), generator=torch.Generator().manual_seed(2))}
    if name.endswith("MultipleChoice"):
        for argument in inputs:
            inputs[argument] = torch.stack([inputs[argument].roll(i, 1) for i in range(3)], dim=1)
        return {"labels": LABELS["choice"]}
    if name.endswith("AudioFrameClassification"):
        frames = model.base_model.feature_extractor(inputs["input_values"]).shape[-1]
        return {"labels": nn.functional.one_hot(torch.arange(frames).expand(4, -1) % 2, 2)}
    if name.endswith("TokenClassification"):
        return {"labels": (TOKENS % 2).masked_fill(UNLABELLED, -100)}
    if name.endswith("ElectraForPreTraining"):
        inputs["attention_mask"] = (~UNLABELLED).long()
        return {"labels": (TOKENS % 2).masked_fill(UNLABELLED, -100)}
    if name.endswith(("Classification", "NextSentencePrediction", "XVector")):
        ignored = -100 if name.endswith("SequenceClassification") else 0
        return {"labels": torch.tensor([0, 1, ignored, 1])}
    two = [other for other in names if other in ("next_sentence_label", "sentence_order_label")]
    labels = TOKENS if name.endswith("CTC") else TOKENS.masked_fill(UNLABELLED, -100)
    return {"labels": labels} | {other: torch.tensor([0, 1, 1, 0]) for other in two}


def rows_of(model) -> list[dict]:
    inputs = inputs_of(model)
    labels = labels_of(model, inputs)  # which may change the inputs
    given = {**inputs, **labels}
    return [{name: value if value is True else value[i] for name, value in given.items()} for i in range(4)]


def collate(rows: list[dict]) -> dict:
    flags = {name: True for name, value in rows[0].items() if value is True}
    return batch_of([{name: value for name, value in row.items() if name not in flags} for row in rows]) | flags


def gradient(model, batches: list[dict], folder) -> torch.Tensor:
    """The gradient of a step of the stock `Trainer`."""
    arguments = TrainingArguments(
        str(folder), gradient_accumulation_steps=len(batches), use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments)
    trainer.current_gradient_accumulation_steps = len(batches)
    batches, number = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    model.zero_grad()
    try:
        for i, batch in enumerate(batches, 1):
            GradientState()._set_sync_gradients(i == len(batches))
            trainer.training_step(model, batch, number)
    finally:
        GradientState()._set_sync_gradients(True)
    zero = torch.zeros
    return torch.cat([(zero(p.shape) if p.grad is None else p.grad).flatten() for p in model.parameters()]).double()


def expect_the_same(model, rows, folder):
    whole = gradient(model, [collate(rows)], folder)
    parts = gradient(model, [collate([row]) for row in rows], folder)
    assert whole.norm() > 1e-3
    # Sums of float32 in another order; the gradient of a bias before a softmax or a norm is such a sum of zero
    assert (parts - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("name", sorted(HEADS.keys() - REFUSED - REFUSED_WITH_OTHER_NUMBERS))
def test_accumulated_rows_give_the_update_of_one_batch(name, tmp_path):
    model = make(name)
    expect_the_same(model, rows_of(model), tmp_path)


@pytest.mark.parametrize("name", sorted(REFUSED | REFUSED_WITH_OTHER_NUMBERS))
def test_other_heads_refuse_accumulated_rows_by_name(name, tmp_path):
    model = make(name)
    rows = rows_of(model)
    assert gradient(model, [collate(rows)], tmp_path).norm() > 0
    with pytest.raises(ValueError, match=rf"The loss of GMA{name}.*gradient_accumulation_steps=1"):
        gradient(model, [collate([row]) for row in rows], tmp_path)
    # What was refused leaves nothing behind
    assert gradient(model, [collate(rows)], tmp_path).norm() > 0


@pytest.mark.parametrize("name", sorted(REFUSED_WITH_OTHER_NUMBERS))
def test_rows_with_equal_numbers_of_patches_or_objects_add_up(name, tmp_path):
    model = make(name)
    rows = rows_of(model)
    for i, row in enumerate(rows):
        if "labels" in row:
            row["labels"] = [{key: value[:1] for key, value in row["labels"][0].items()}]
        else:
            row["bool_masked_pos"] = (torch.arange(16) + i) % 4 == 0
    expect_the_same(model, rows, tmp_path)


def test_labels_that_a_head_ignores_and_trainer_counts_are_refused(tmp_path):
    model = make("DPTForSemanticSegmentation")
    rows = rows_of(model)
    rows[1]["labels"][:4] = 255
    with pytest.raises(ValueError, match=r"other than 255.*semantic_loss_ignore_index=-100"):
        gradient(model, [collate([row]) for row in rows], tmp_path)
    model.config.semantic_loss_ignore_index = -100
    rows[1]["labels"][:4] = -100
    expect_the_same(model, rows, tmp_path)


def test_labels_of_replaced_tokens_are_those_of_the_mask(tmp_path):
    model = make("ElectraForPreTraining")
    rows = rows_of(model)
    for row in rows:
        row["labels"] = row["labels"].clamp(min=0)
    with pytest.raises(ValueError, match=r"mean over the tokens of `attention_mask`.*give padding the label -100"):
        gradient(model, [collate([row]) for row in rows], tmp_path)
    for row in rows:
        row["labels"][LENGTH - 1] = -100
    with pytest.raises(ValueError, match="has no label for tokens that are ignored"):
        gradient(model, [collate(rows)], tmp_path)


def test_the_balance_of_experts_is_announced(tmp_path, caplog):
    model = make("GptOssForCausalLM")
    model.config.output_router_logits = True
    transformers.utils.logging.enable_propagation()
    gradient(model, [collate([row]) for row in rows_of(model)], tmp_path)
    assert "balances its experts" in caplog.text
