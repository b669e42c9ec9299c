# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What cannot be served is refused when vLLM starts, with the name of what was asked for."""

import json
import logging
import shutil

import pytest

from tests.serving.models import make_model


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

import gma_hf
from gma_hf.serving.checks import TESTED_VLLM, warn_of_other_version
from tests.serving.engines import engine, slot_layers


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    make_model("paper").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    make_model("gated").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    make_model("llama").save_pretrained(folder)
    return folder


def changed(folder, tmp_path, **fields):
    """A copy of a folder whose config.json says something else."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | fields
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def expect_refusal(folder, message: str, **options):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        with engine(folder, **options):
            pass


def test_a_folder_of_a_newer_version_is_refused(native, tmp_path):
    expect_refusal(
        changed(native, tmp_path, gma_hf_version="99.0.0"), rf"saved by gma_hf 99\.0\.0, but {gma_hf.__version__}"
    )


def test_heads_that_generate_nothing_are_refused(native, tmp_path):
    folder = changed(native, tmp_path, architectures=["GMAForSequenceClassification"])
    expect_refusal(folder, "does not serve GMAForSequenceClassification")


def test_a_bidirectional_model_is_refused(native, tmp_path):
    expect_refusal(changed(native, tmp_path, is_causal=False), "bidirectional GMA model generates nothing")


def test_other_converted_architectures_are_refused_by_name(converted, tmp_path):
    folder = changed(converted, tmp_path, model_type="gma_phi3", architectures=["GMAPhi3ForCausalLM"])
    expect_refusal(folder, "does not serve GMAPhi3ForCausalLM")


def test_the_way_through_transformers_is_refused(converted):
    """It would run the model without states, and answer wrongly."""
    expect_refusal(converted, "GMALlamaForCausalLM|through Transformers", model_impl="transformers")


def test_converted_layers_of_different_shapes_are_refused(converted, tmp_path):
    gma = json.loads((converted / "config.json").read_text())["gma"]
    gma["layers"]["layers.1.self_attn"]["rotary_dim"] = 0
    expect_refusal(changed(converted, tmp_path, gma=gma), "states of one shape")


def test_a_context_beyond_the_learned_positions_is_refused(native, monkeypatch):
    expect_refusal(native, "max_position_embeddings", max_model_len=5000)
    # The way that vLLM offers around its own check would index beyond the table
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    expect_refusal(native, "learned only 4096 positions", max_model_len=5000)


def test_a_context_beyond_those_of_training_is_allowed_without_learned_positions(gated):
    with engine(gated, max_model_len=100_000) as llm:
        assert len(slot_layers(llm)) == 3


def test_too_little_memory_for_one_state_is_refused(gated):
    expect_refusal(gated, "[Mm]emory", kv_cache_memory_bytes=4096)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tensor_parallel_size": 3}, "must divide `num_attention_heads`"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA"),
        ({"runner": "pooling"}, "generate text"),
        ({"mamba_ssm_cache_dtype": "float16"}, "float32"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding",
        ),
    ],
)
def test_options_that_gma_layers_cannot_follow_are_refused(gated, options, message):
    expect_refusal(gated, message, **options)


def test_prefix_caching_is_off_with_a_line_in_the_log(gated, caplog):
    logger = logging.getLogger("gma_hf.serving.checks")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with engine(gated, enable_prefix_caching=True) as llm:
            assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
    assert "Prefix caching is off: the state of a GMA layer is a running sum" in caplog.text


def test_another_version_of_vllm_is_named_in_a_warning(caplog):
    logger = logging.getLogger("gma_hf.serving.checks")
    logger.addHandler(caplog.handler)
    try:
        warn_of_other_version(f"{TESTED_VLLM}+cpu")
        assert not caplog.records
        warn_of_other_version("0.99.1")
    finally:
        logger.removeHandler(caplog.handler)
    assert TESTED_VLLM in caplog.text
    assert "0.99.1" in caplog.text
