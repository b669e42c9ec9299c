# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Nonsense in a configuration is a `ValueError` that names the field, from Python, from JSON and from a command line."""

import json
import math
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from gma_hf import GMAConfig


pytestmark = pytest.mark.quick

INHERITED = {field.name for field in fields(PreTrainedConfig)}
OWN = [field for field in fields(GMAConfig) if field.name not in INHERITED and not field.name.endswith("_token_id")]
FLOATS = [field.name for field in OWN if field.type == (float | int)]
INTEGERS = [field.name for field in OWN if field.type in (int, int | None)]
BOOLEANS = [field.name for field in OWN if field.type is bool]


def refused(name: str, value, make=GMAConfig):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make(**{name: value})


def test_every_field_has_a_kind():
    other = {
        "layer_types",
        "position_embedding_type",
        "rope_parameters",
        "prior_init",
        "mean_init",
        "hidden_act",
        "decay_rate_range",
        "head_norm_eps",
    }
    assert {field.name for field in OWN} == {*FLOATS, *INTEGERS, *BOOLEANS, *other}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, "small", None])
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_finite_and_not_negative(name, value):
    refused(name, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0, "small"])
def test_the_epsilon_of_the_head_norm_is_one(value):
    refused("head_norm_eps", value, lambda **values: GMAConfig(normalize_read=False, **values))


@pytest.mark.parametrize("value", [2.5, math.nan, "8", -3, True, 2**63])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_integers_and_not_negative(name, value):
    refused(name, value)


@pytest.mark.parametrize("value", ["no", 1, 0.5, None])
@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_are_booleans(name, value):
    refused(name, value)


@pytest.mark.parametrize("value", [(1.0, math.nan), (1.0, math.inf), (0.0, 1.0), (1.0,), (1.0, 2.0, 3.0), "1-16"])
def test_a_range_is_two_finite_numbers(value):
    refused("decay_rate_range", value)


@pytest.mark.parametrize("name", FLOATS)
def test_an_integer_will_do_for_a_float(name):
    value = 0 if "dropout" in name else 1
    values = {"variance_init": 2, "time_step_max": 1} | {name: 16 if name == "variance_init" else value}
    config = GMAConfig(**values)
    assert getattr(config, name) == values[name] and type(getattr(config, name)) is float


def test_an_integer_will_do_in_json_and_in_a_range(tmp_path):
    GMAConfig(decay_rate_range=[1, 16]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_init": 16}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.variance_init == 16.0 and list(config.decay_rate_range) == [1, 16]
    config.update_from_string("variance_init=3,use_decay=true")
    assert config.variance_init == 3.0 and config.use_decay is True


def test_what_changes_a_configuration_later_is_checked_too(tmp_path):
    GMAConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`window_size` must be 0"):
        AutoConfig.from_pretrained(tmp_path, window_size=-3)
    with pytest.raises(ValueError, match="`variance_init`"):
        GMAConfig().update_from_string("variance_init=nan")
    with pytest.raises(ValueError, match="window_size"):
        GMAConfig().window_size = 2.5
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"window_size": -3}))
    with pytest.raises(ValueError, match="`window_size` must be 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


TYPOS = {"num_compnents": "num_components", "windw_size": "window_size", "head_dims": "head_dim"}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_misspelt_field_is_refused_with_the_field_that_was_meant(typo, tmp_path):
    message = f"no field `{typo}`. Did you mean `{TYPOS[typo]}`"
    for make in (GMAConfig, lambda **values: GMAConfig.from_preset("gated", **values)):
        with pytest.raises(ValueError, match=message):
            make(**{typo: 8})
    GMAConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **{typo: 8})


def test_errors_are_also_what_transformers_raises_for_its_own_configurations():
    with pytest.raises(StrictDataclassFieldValidationError):
        GMAConfig(window_size=2.5)
    with pytest.raises(StrictDataclassClassValidationError):
        GMAConfig(window_size=-3)


def test_what_transformers_and_users_add_of_their_own_is_taken(tmp_path):
    extras = {
        "num_labels": 3,
        "id2label": {0: "a", 1: "b", 2: "c"},
        "architectures": ["GMAForCausalLM"],
        "sep_token_id": 4,
        "decoder_start_token_id": 5,
        "num_beams": 1,
        "output_attentions": False,
        "attn_implementation": "eager",
        "task_specific_params": {"a": 1},
        "name_of_my_run": "first",
        "rope_theta": 5000.0,
    }
    config = GMAConfig(**extras)
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.num_labels == 3 and reloaded.sep_token_id == 4 and reloaded.name_of_my_run == "first"
