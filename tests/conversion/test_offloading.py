# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Models whose layers Accelerate keeps on the CPU or on the disk: converted and calibrated like others, or refused by name."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

from gma_hf import GMAForCausalLM, analysis, convert_to_gma, gma_layers, revert_to_softmax
from gma_hf.analysis.statistics import TokenBatch
from gma_hf.conversion import calibrate, rank_layers
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import VOCAB, make_converted_model, make_inputs, make_softmax_model, output_of


DEVICE_MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
DEVICE_MAP |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
OPTIONS = {"num_components": 6, "window_size": 3, "num_sink_tokens": 1}
KINDS = ["cpu_offload", "disk_offload", "dispatch_model", "from_pretrained"]


def offloaded(kind, folder, model=None):
    model = make_softmax_model("llama") if model is None else model
    if kind == "from_pretrained":
        model.save_pretrained(folder / "source")
        return AutoModelForCausalLM.from_pretrained(
            folder / "source", device_map=DEVICE_MAP, offload_folder=folder / "offload"
        )
    if kind == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if kind == "disk_offload":
        return disk_offload(model, folder / "offload", execution_device=torch.device("cpu"))
    return dispatch_model(model, DEVICE_MAP, offload_dir=folder / "offload", main_device="cpu")


@pytest.fixture
def tokens():
    return make_inputs("llama")["input_ids"]


@pytest.fixture
def corpus():
    return torch.randint(3, VOCAB, (8, 40), generator=torch.Generator().manual_seed(4)).split(4)


def in_memory(**options):
    model = make_softmax_model("llama")
    torch.manual_seed(5)
    return convert_to_gma(model, **OPTIONS, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_is_converted_calibrated_and_reverted_like_one_in_memory(kind, tokens, corpus, tmp_path):
    model = offloaded(kind, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters()), "nothing is offloaded: the test shows nothing"
    softmax = output_of(model, input_ids=tokens)
    expected = in_memory()
    torch.manual_seed(5)
    convert_to_gma(model, **OPTIONS)
    assert not any(p.is_meta for layer in gma_layers(model).values() for p in layer.parameters())
    assert torch.equal(output_of(model, input_ids=tokens), output_of(expected, input_ids=tokens))

    for one in (model, expected):
        calibrate(one, corpus, progress=False, em_steps=3)
    assert torch.equal(output_of(model, input_ids=tokens), output_of(expected, input_ids=tokens))
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens, **arguments), expected.generate(tokens, **arguments))

    revert_to_softmax(model)
    assert torch.equal(output_of(model, input_ids=tokens), softmax)


@pytest.mark.parametrize("kind", ["dispatch_model", "from_pretrained"])
def test_an_offloaded_model_is_saved_with_its_mixtures(kind, tokens, tmp_path):
    model = convert_to_gma(offloaded(kind, tmp_path), **OPTIONS)
    expected = output_of(model, input_ids=tokens)
    model.save_pretrained(tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert torch.equal(output_of(loaded, input_ids=tokens), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_an_offloaded_model_are_ranked_like_those_of_one_in_memory(kind, corpus, tmp_path):
    rankings = []
    for model in (offloaded(kind, tmp_path), make_softmax_model("llama")):
        torch.manual_seed(5)
        rankings.append(rank_layers(model, list(corpus), progress=False, num_components=6))
    assert rankings[0] == rankings[1]


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_that_are_offloaded_themselves_are_not_calibrated_and_the_error_says_the_way_out(
    kind, corpus, tmp_path
):
    model = offloaded(kind, tmp_path, make_converted_model("llama"))
    with pytest.raises(
        ValueError, match=r"mixtures of model.layers.\d.self_attn are not in memory.*Calibrate the model before"
    ):
        calibrate(model, corpus, progress=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"window_size": 3, "num_sink_tokens": 1}], ids=["plain", "windowed"])
def test_an_offloaded_converted_model_is_analysed_like_one_in_memory(kind, options, tokens, tmp_path):
    model = offloaded(kind, tmp_path, make_converted_model("llama", **options))
    assert any(parameter.is_meta for layer in gma_layers(model).values() for parameter in layer.parameters())
    check_analysis(model, make_converted_model("llama", **options), tokens)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("block", ["paper", "gated", "windowed", "hybrid"])
def test_an_offloaded_native_model_is_analysed_like_one_in_memory(kind, block, tokens, tmp_path):
    models = [make_model(GMAForCausalLM, tiny_config(block)) for _ in range(2)]
    check_analysis(offloaded(kind, tmp_path, models[0]), models[1], tokens)


def check_analysis(model, expected, tokens):
    for analyse in (analysis.responsibilities, analysis.implied_affinity):
        found, wanted = (analyse(one, input_ids=tokens) for one in (model, expected))
        assert found.keys() == wanted.keys() and found
        for name, tensors in wanted.items():
            torch.testing.assert_close(found[name], tensors, msg=name)
    found, wanted = (
        analysis.collect_statistics(one, [TokenBatch({"input_ids": tokens})]) for one in (model, expected)
    )
    for name, roles in wanted.items():
        torch.testing.assert_close(found[name].keys.usage, roles.keys.usage, msg=name)
