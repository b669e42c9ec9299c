# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Options of a conversion are checked when a model is converted, and again when a saved folder is loaded."""

import dataclasses
import inspect
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gma_hf import convert_to_gma, gma_layers
from gma_hf.conversion import GMAConversion, GMAConversionConfig, fit_mixtures
from gma_hf.conversion.config import RECIPES
from tests.conversion.tiny_models import make_converted_model, make_inputs, make_softmax_model, output_of


WRONG = [
    ("num_components", 0, "must be positive, got 0"),
    ("num_components", 2.5, "must be a whole number, got 2.5"),
    ("num_components", 16.0, "must be a whole number, got 16.0"),
    ("num_components", "16", "must be a whole number, got '16'"),
    ("num_components", True, "must be a whole number, got True"),
    ("window_size", -3, "must not be negative, got -3. 0 means no window."),
    ("window_size", 2.5, "must be a whole number, got 2.5"),
    ("num_sink_tokens", -1, "must not be negative, got -1"),
    ("num_sink_tokens", math.nan, "must be a whole number, got nan"),
    ("use_routing_projections", "yes", "must be True or False, got 'yes'"),
    ("use_forgetting", 1, "must be True or False, got 1"),
    ("variance_floor", math.nan, "must be a finite number, got nan"),
    ("variance_floor", 0.0, "must be positive, got 0.0"),
    ("read_eps", -1.0, "must be positive, got -1.0"),
    ("read_eps", "small", "must be a finite number, got 'small'"),
    ("mean_init_std", -1.0, "must not be negative, got -1.0"),
    ("mean_init_std", math.inf, "must be a finite number, got inf"),
    ("variance_init", math.nan, "must be a finite number, got nan"),
    ("variance_init", 1e-9, r"\(1e-09\) must exceed `variance_floor`"),
]
SELECTION = [
    ("keep_every", 2.5, "must be a whole number, got 2.5"),
    ("keep_every", 0, "must be at least 2, got 0"),
    ("keep_every", math.nan, "must be a whole number, got nan"),
    ("undo_rotation", "no", "must be True or False, got 'no'"),
    ("undo_rotation_beyond", math.nan, "must be a finite number, got nan"),
    ("undo_rotation_beyond", -1, "must not be negative, got -1"),
]


@pytest.mark.parametrize(("name", "value", "message"), [*WRONG, *SELECTION])
def test_converting_with_a_wrong_value_names_the_option_the_value_and_what_was_expected(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}`.*{message}"):
        convert_to_gma(make_softmax_model("llama"), **{name: value})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_converted_model("llama", window_size=3).save_pretrained(folder)
    return folder


@pytest.fixture
def edited(saved, tmp_path):
    """A folder whose config.json has other values in its entry `gma`."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def edit(change):
        config = json.loads((saved / "config.json").read_text("utf-8"))
        changed = change(config["gma"])
        config["gma"] = config["gma"] if changed is None else changed
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        return tmp_path

    return edit


@pytest.mark.parametrize(
    ("name", "value", "message"), [*WRONG, ("window_size", None, "must be a whole number, got None")]
)
def test_loading_a_folder_with_a_wrong_value_names_it_too(name, value, message, edited):
    folder = edited(lambda gma: gma.update({name: value}))
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"`{name}`.*{message}"):
            load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gma: gma.update(num_compnents=8), "`num_compnents` .*the value 8.* Did you mean `num_components`?"),
        (lambda gma: gma.update(rank=8), "`rank` .* is no option of a conversion. Known are: layers, "),
        (lambda gma: gma.pop("window_size") and None, "lacks `window_size`"),
        (lambda gma: "nonsense", "must be a dictionary, got 'nonsense'"),
        (lambda gma: gma.update(layers=["layers.0.self_attn"]), "`layers` must map names of attention modules"),
        (lambda gma: gma.update(softmax_layers="none"), "`softmax_layers` must be a list of names"),
        (lambda gma: gma["layers"]["layers.0.self_attn"].update(num_heads=-4), r"num_heads` must be positive, got -4"),
        (
            lambda gma: gma["layers"]["layers.0.self_attn"].update(num_key_value_heads=3),
            r"\(3\) must divide `num_heads`",
        ),
        (
            lambda gma: gma["layers"]["layers.0.self_attn"].update(rotary_dim=99),
            r"\(99\) must not exceed `routing_dim`",
        ),
        (
            lambda gma: gma["layers"]["layers.0.self_attn"].update(is_casual=True),
            "`is_casual`.*Did you mean `is_causal`",
        ),
        (lambda gma: gma["layers"]["layers.0.self_attn"].pop("value_dim") and None, "lacks `value_dim`"),
        (lambda gma: gma["layers"]["layers.0.self_attn"].update(undone_columns=[[3, 1]]), r"a pair of a first column"),
        (
            lambda gma: gma.update(layers={"layers.7.self_attn": gma["layers"]["layers.0.self_attn"]}),
            "has none of the layers that its configuration calls converted: layers.7.self_attn",
        ),
    ],
)
def test_a_folder_with_nonsense_is_refused_with_what_is_wrong(change, message, edited):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(change))


def test_a_folder_that_was_not_edited_loads(saved, edited):
    tokens = make_inputs("llama")["input_ids"]
    outputs = [
        output_of(AutoModelForCausalLM.from_pretrained(x), input_ids=tokens) for x in (saved, edited(lambda _: None))
    ]
    assert torch.equal(*outputs)


def test_whole_numbers_for_real_ones_are_taken_and_saved(tmp_path):
    model = convert_to_gma(make_softmax_model("llama"), num_components=6, variance_init=16, mean_init_std=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.gma["variance_init"] == 16.0
    tokens = make_inputs("llama")["input_ids"]
    assert torch.equal(output_of(loaded, input_ids=tokens), output_of(model, input_ids=tokens))


def test_every_option_of_the_dataclass_is_a_keyword_of_convert_to_gma_with_the_same_default():
    keywords = inspect.signature(convert_to_gma).parameters
    from_recipes = {name for options in RECIPES.values() for name in options}
    for option in dataclasses.fields(GMAConversionConfig):
        if option.name not in ("layers", "softmax_layers"):
            default = keywords[option.name].default
            # `None` where a recipe may say something else
            assert default == option.default or (default is None and option.name in from_recipes), option.name
    model = convert_to_gma(make_softmax_model("llama"))
    defaults = {option.name: option.default for option in dataclasses.fields(GMAConversionConfig)}
    assert {name: value for name, value in model.config.gma.items() if "layers" not in name} == {
        name: value for name, value in defaults.items() if "layers" not in name
    }


def test_every_option_reaches_the_layer():
    taken = inspect.signature(GMAConversion).parameters
    model = make_converted_model("llama", window_size=3, num_sink_tokens=1)
    arguments = GMAConversionConfig.from_dict(model.config.gma).layer_arguments("layers.0.self_attn")
    assert arguments.keys() == taken.keys()
    assert (arguments["window_size"], arguments["num_sink_tokens"], arguments["num_heads"]) == (3, 1, 4)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "`num_components` must be positive"),
        ({"em_steps": -1}, "`em_steps` must not be negative"),
        ({"lloyd_steps": 2.5}, "`lloyd_steps` must be a whole number"),
        ({"variance_floor": math.nan}, "`variance_floor` must be a finite number"),
    ],
)
def test_nonsense_in_the_fit_of_mixtures_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit_mixtures(torch.randn(2, 50, 4), **{"num_components": 3, **options})


@pytest.mark.quick
def test_what_is_no_model_and_no_example_is_refused_by_name():
    with pytest.raises(ValueError, match="`gma_layers` takes a model, got str"):
        gma_layers("gpt2")
    with pytest.raises(ValueError, match="`example_inputs` must map arguments"):
        convert_to_gma(make_softmax_model("llama"), example_inputs=3)
