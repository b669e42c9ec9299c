# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A converted model is saved under a type of its own, and loads wherever gma_hf is installed."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import gma_hf
from gma_hf import convert_to_gma, gma_layers, revert_to_softmax
from gma_hf.modeling import GMAMixture
from gma_hf.remote_code import HOW_TO_INSTALL
from tests.conversion.tiny_models import (
    SIZES,
    make_converted_model,
    make_inputs,
    make_softmax_model,
    output_of,
    perturb,
)
from tests.test_remote_code import run_program


HYBRID = {
    "layers": [1],
    "window_size": 3,
    "num_sink_tokens": 2,
    "use_forgetting": True,
    "use_routing_projections": True,
}


@pytest.fixture
def tokens():
    return make_inputs("llama")["input_ids"]


@pytest.mark.quick
def test_a_checkpoint_from_before_sink_tokens_has_none(tokens, tmp_path):
    model = make_converted_model("llama", window_size=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["gma"].pop("num_sink_tokens") == 0
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded, input_ids=tokens), output_of(model, input_ids=tokens))


@pytest.mark.quick
def test_a_checkpoint_from_before_memories_were_diluted_loads_without_a_word(tokens, tmp_path):
    model = make_converted_model("llama", window_size=3)
    with torch.no_grad():
        for layer in gma_layers(model).values():
            layer.window_norm.memory_dilution.zero_()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "memory_dilution" not in name}
    assert kept.keys() != weights.keys()
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(output_of(loaded, input_ids=tokens), output_of(model, input_ids=tokens))


@pytest.mark.quick
@pytest.mark.parametrize("trust", [False, True], ids=["imported", "trusted"])
def test_a_fresh_process_gets_the_same_logits(trust, tokens, tmp_path):
    """After `import gma_hf`, or without it by `trust_remote_code=True`."""
    model = make_converted_model("llama", **HYBRID)
    model.save_pretrained(tmp_path / "model")
    torch.save((tokens, output_of(model, input_ids=tokens)), tmp_path / "expected.pt")
    source = f"""
import sys, torch
{"" if trust else "import gma_hf"}
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code={trust})
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert type(model).__name__ == "GMALlamaForCausalLM"
assert torch.equal(model(tokens).logits, expected)
AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code={trust})
model.save_pretrained({str(tmp_path / "again")!r})
print("same logits")
"""
    result = run_program(source, tmp_path)
    assert result.returncode == 0 and "same logits" in result.stdout, result.stderr
    # What such a program saves loads again
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(output_of(again, input_ids=tokens), output_of(model, input_ids=tokens))


def test_software_without_gma_hf_fails_loudly(tmp_path):
    make_converted_model("llama").save_pretrained(tmp_path / "model")
    source = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=%s)"
    trusting = run_program(source % True, tmp_path, hide_gma_hf=True)
    assert trusting.returncode != 0 and HOW_TO_INSTALL in trusting.stderr
    assert "pip install gma_hf" not in trusting.stderr
    doubting = run_program(source % False, tmp_path, hide_gma_hf=True)
    assert doubting.returncode != 0 and "trust_remote_code" in doubting.stderr


def test_import_brings_no_model_of_transformers(tmp_path):
    """Every converted type is known after `import gma_hf`, and none of the originals is imported for it."""
    source = """
import sys
from transformers import AutoConfig, AutoModel, PreTrainedModel
import transformers.models.auto.modeling_auto
before = set(sys.modules)
import gma_hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "gma_llama" in CONFIG_MAPPING and "gma_bert" in CONFIG_MAPPING
print([name for name in set(sys.modules) - before if name.startswith("transformers.models.")])
"""
    result = run_program(source, tmp_path)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.quick
def test_the_configuration_tells_what_was_converted(tmp_path):
    make_converted_model("llama", **HYBRID).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "gma_llama" and saved["architectures"] == ["GMALlamaForCausalLM"]
    assert list(saved["gma"]["layers"]) == ["layers.1.self_attn"]
    assert saved["gma"]["softmax_layers"] == ["layers.0.self_attn"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "GMALlamaConfig" and config.gma == saved["gma"]
    assert isinstance(AutoConfig.for_model("gma_llama", gma=config.gma), type(config))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_survives_in_every_dtype(dtype, tmp_path):
    model = make_converted_model("llama", **HYBRID)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.to(dtype), rtol=0, atol=0, msg=name)
    loaded.save_pretrained(tmp_path / "narrow")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype="auto").dtype == dtype


def test_shards_and_devices(tokens, tmp_path):
    model = make_converted_model("llama", **HYBRID)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for arguments in ({}, {"device_map": {"": "cpu"}}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
        assert torch.equal(output_of(loaded, input_ids=tokens), output_of(model, input_ids=tokens))


def test_layers_may_stay_on_disk(tokens, tmp_path):
    model = make_converted_model("llama", **HYBRID)
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[1].self_attn.gma.mixture_norm.means.device.type == "meta"
    torch.testing.assert_close(output_of(loaded, input_ids=tokens), output_of(model, input_ids=tokens))
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(tokens, **arguments), model.generate(tokens, **arguments))


@pytest.mark.quick
def test_other_heads_keep_the_mixtures(tmp_path):
    """A classifier from a converted language model: a new head, everything else as it was."""
    model = make_converted_model("llama", **HYBRID)
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert type(classifier).__name__ == "GMALlamaForSequenceClassification"
    assert set(info["missing_keys"]) == {"score.weight"}
    base = AutoModel.from_pretrained(tmp_path)
    for name, tensor in model.model.state_dict().items():
        for other in (base, classifier.model):
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.quick
def test_a_model_converted_without_its_head_loads_with_one(tmp_path):
    model = make_softmax_model("bert").bert
    perturb(convert_to_gma(model, num_components=6)).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert list(gma_layers(loaded)) == [f"bert.{name}" for name in gma_layers(model)]
    tokens = make_inputs("bert")
    expected = output_of(model, **tokens)
    torch.testing.assert_close(output_of(loaded.bert, **tokens), expected, rtol=0, atol=0)


def test_parts_of_a_model_of_two_encoders(tmp_path):
    """Text and vision encoders in one model, each with a configuration of its own."""
    config = transformers.SiglipConfig(
        text_config={**SIZES, "projection_size": 32},
        vision_config={key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        | {"num_attention_heads": 4, "image_size": 8, "patch_size": 2},
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    inputs = {**make_inputs("bert"), **make_inputs("vit")}

    def embeddings(one):
        with torch.no_grad():
            outputs = one(**inputs)
        return outputs.text_embeds, outputs.image_embeds

    before = embeddings(model)
    perturb(convert_to_gma(model, layers=["vision_model"], num_components=6))
    after = embeddings(model)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    model.save_pretrained(tmp_path)
    assert all(map(torch.equal, embeddings(AutoModel.from_pretrained(tmp_path)), after))
    assert config.model_type == "siglip" and not hasattr(config, "gma")
    assert all(map(torch.equal, embeddings(revert_to_softmax(model)), before))


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, HYBRID], ids=["all", "hybrid"])
def test_attentions_may_be_asked_for_in_the_configuration(options, tokens, tmp_path):
    model = make_converted_model("llama", **options)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(tokens, use_cache=False).attentions) == 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_attentions=True)
    assert len(loaded(tokens, use_cache=False).attentions) == 2


@pytest.mark.quick
def test_the_original_checkpoint_is_not_overwritten(tokens, tmp_path):
    make_softmax_model("llama").save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = convert_to_gma(AutoModelForCausalLM.from_pretrained(tmp_path), num_components=6)
    with pytest.raises(ValueError, match="Save to another folder"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.quick
def test_a_reverted_model_saves_as_the_original(tokens, tmp_path):
    original = make_softmax_model("llama")
    make_converted_model("llama", **HYBRID).save_pretrained(tmp_path / "converted")
    loaded = revert_to_softmax(AutoModelForCausalLM.from_pretrained(tmp_path / "converted"))
    loaded.save_pretrained(tmp_path / "reverted")
    assert not (tmp_path / "reverted" / "gma_remote.py").exists()
    config = json.loads((tmp_path / "reverted" / "config.json").read_text())
    assert config["model_type"] == "llama" and not {"gma", "auto_map"} & config.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "reverted")
    assert type(again) is type(original)
    assert torch.equal(output_of(again, input_ids=tokens), output_of(original, input_ids=tokens))


@pytest.mark.quick
def test_what_a_checkpoint_lacks_is_reported_and_initialised(tmp_path):
    model = make_converted_model("llama", **HYBRID)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "gma" not in name or "means" in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    # But for what a checkpoint from before it lacks by rights
    dilution = {name for name in weights if "memory_dilution" in name}
    assert len(dilution) == 1 and set(info["missing_keys"]) == weights.keys() - kept.keys() - dilution
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    for name, tensor in kept.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    (layer,) = gma_layers(loaded).values()
    assert not layer.q_routing.weight.any() and not layer.window_norm.memory_bias.any()


@pytest.mark.quick
def test_initialising_again_changes_nothing():
    model = make_converted_model("llama", **HYBRID)
    expected = copy.deepcopy(model.state_dict())
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.quick
def test_a_model_is_copied_and_pickled(tokens):
    model = make_converted_model("llama", **HYBRID)
    expected = output_of(model, input_ids=tokens)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(output_of(copied, input_ids=tokens), expected)
        # A copy is a model of its own: what happens to it leaves the other alone
        revert_to_softmax(copied)
        assert torch.equal(output_of(model, input_ids=tokens), expected)


def test_a_class_is_found_by_its_name():
    model = make_converted_model("llama")
    assert gma_hf.conversion.checkpoints.classes.GMALlamaForCausalLM is type(model)
    assert gma_hf.conversion.checkpoints.classes.GMALlamaConfig is type(model.config)
    with pytest.raises(AttributeError):
        gma_hf.conversion.checkpoints.classes.GMANothing  # noqa: B018


def test_a_new_model_of_a_converted_class_is_initialised():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_converted_model("llama").config)
    assert type(model).__name__ == "GMALlamaForCausalLM"
    mixtures = [module for module in model.modules() if isinstance(module, GMAMixture)]
    assert len(mixtures) == 2
    for mixture in mixtures:
        # Of 192 numbers from N(0, 1) the deviation has an error of 1 / sqrt(2 * 192) = 0.05
        assert abs(mixture.means.std() - 1.0) < 0.2
        variances = torch.nn.functional.softplus(mixture.raw_variances) + mixture.variance_floor
        torch.testing.assert_close(variances, torch.ones_like(variances))


def test_the_processor_of_the_original_is_found(tmp_path):
    make_converted_model("whisper").save_pretrained(tmp_path)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8)
    extractor.save_pretrained(tmp_path)
    assert type(transformers.AutoFeatureExtractor.from_pretrained(tmp_path)) is type(extractor)
