# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What was saved is what is loaded, wherever the weights go; what is missing is initialised and reported."""

import copy
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gma_hf
from gma_hf.modeling import GMAMixture
from tests.conftest import make_model, tiny_config


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_pretrained_keeps_every_weight_in_every_dtype(dtype, block, tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = model.state_dict()
    for name, tensor in reloaded.state_dict().items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, expected[name].to(dtype), rtol=0, atol=0, msg=name)


def test_a_model_saved_in_shards_loads_the_same(tokens, tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_a_model_built_on_the_meta_device_loads_its_means(tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = gma_hf.GMAForCausalLM(model.config)
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False, assign=True)
    mixtures = [module for module in empty.modules() if isinstance(module, GMAMixture)]
    originals = [module for module in model.modules() if isinstance(module, GMAMixture)]
    assert len(mixtures) == 3
    for mixture, original in zip(mixtures, originals, strict=True):
        torch.testing.assert_close(mixture.means, original.means, rtol=0, atol=0)


def test_device_map_loads_and_runs(tokens, tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("hybrid"))
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_only_the_new_head_is_initialised_when_fine_tuning(tokens, tmp_path):
    base = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    base.save_pretrained(tmp_path)
    classifier, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, output_loading_info=True
    )
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"score"}
    for name, tensor in classifier.model.state_dict().items():
        torch.testing.assert_close(tensor, base.model.state_dict()[name], rtol=0, atol=0, msg=name)


@pytest.mark.quick
def test_the_saved_dtype_is_the_loaded_dtype(tmp_path):
    make_model(gma_hf.GMAForCausalLM, tiny_config("gated")).to(torch.bfloat16).save_pretrained(tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_layers_may_stay_on_disk(tokens, block, tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    device_map |= {"layers.0": "cpu", "layers.1": "disk", "layers.2": "disk"}
    device_map = {f"model.{name}": device for name, device in device_map.items()}
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert reloaded.model.layers[2].self_attn.q_proj.weight.device.type == "meta"
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(reloaded.generate(tokens, **arguments), model.generate(tokens, **arguments))


@pytest.mark.quick
def test_a_checkpoint_from_before_memories_were_diluted_loads_without_a_word(tokens, tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("windowed"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "memory_dilution" not in name}
    assert len(weights) - len(kept) == model.config.num_hidden_layers
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reloaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.window_norm.memory_dilution.zero_()
    assert torch.equal(reloaded(tokens).logits, model(tokens).logits)


@pytest.mark.quick
@pytest.mark.parametrize("missing", ["mixture_norm.means", "mixture_norm.prior_logits", "layers.0."])
def test_what_a_checkpoint_lacks_is_reported_and_initialised(missing, block, tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if missing not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reloaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    # But for what a checkpoint from before it lacks by rights
    expected = {name for name in weights.keys() - kept.keys() if "memory_dilution" not in name}
    assert set(info["missing_keys"]) == expected
    for name, parameter in reloaded.named_parameters():
        assert parameter.isfinite().all(), name
        if name in kept:
            torch.testing.assert_close(parameter, weights[name], rtol=0, atol=0, msg=name)
    for name, buffer in reloaded.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=0, atol=0, msg=name)
    attention = reloaded.model.layers[0].self_attn
    if missing == "layers.0.":
        # As in a new model: norms do nothing, variances, priors and steps are what the configuration says
        assert (attention.o_norm is None or (attention.o_norm.weight == 1).all()) and (
            reloaded.model.layers[0].input_layernorm.weight == 1
        ).all()
        at_origin = attention.mixture_norm.responsibilities(torch.zeros(1, 4, 1, reloaded.config.routing_dim))
        if reloaded.config.prior_init == "balanced":
            torch.testing.assert_close(at_origin, torch.full_like(at_origin, 1 / 6))
        if reloaded.config.use_decay:
            steps = torch.nn.functional.softplus(attention.dt_bias)
            assert (steps >= 0.999e-3).all() and (steps <= 1.001e-1).all()


@pytest.mark.quick
def test_initialising_a_loaded_model_again_changes_nothing(block):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    expected = copy.deepcopy(model.state_dict())
    model.init_weights()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "`layer_types` needs one entry per layer"),
        ({"num_key_value_heads": 3}, "must divide `num_attention_heads`"),
        ({"position_embedding_type": "alibi"}, "one of \\['learned', 'rope', 'none'\\]"),
    ],
)
def test_an_impossible_change_of_the_configuration_is_refused(changes, message, tmp_path):
    make_model(gma_hf.GMAForCausalLM, tiny_config("gated")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **changes)


@pytest.mark.quick
def test_a_model_is_copied_and_pickled(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    expected = model(tokens).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(tokens).logits, expected, rtol=0, atol=0)
