# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`convert_to_gma(model, recipe=...)`: options that belong together, and what the user changes of them."""

import pytest
import torch

from gma_hf import convert_to_gma, gma_layers, revert_to_softmax
from gma_hf.commands.shared.conversion import ConversionArguments
from gma_hf.conversion import rank_layers
from gma_hf.conversion.config import RECIPES
from gma_hf.training.arguments import parse_arguments
from tests.conversion.tiny_models import make_inputs, make_softmax_model, output_of


def converted(recipe, model_type="llama", **options):
    overrides = {"num_hidden_layers": 8} if model_type == "llama" else {}
    return convert_to_gma(make_softmax_model(model_type, **overrides), recipe=recipe, num_components=6, **options)


def what_it_has(model):
    gma = model.config.gma
    names = ("window_size", "num_sink_tokens", "use_routing_projections", "use_forgetting")
    return tuple(gma[name] for name in names), [int(name.split(".")[1]) for name in gma["softmax_layers"]]


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("hybrid", {}, ((128, 1, True, False), [3, 7])),
        ("window", {}, ((128, 1, True, False), [])),
        ("linear", {}, ((0, 0, True, True), [])),
        (None, {}, ((0, 0, False, False), [])),
        # What is given wins
        ("hybrid", {"window_size": 64, "keep_every": 2}, ((64, 1, True, False), [1, 3, 5, 7])),
        ("window", {"num_sink_tokens": 4, "use_routing_projections": False}, ((128, 4, False, False), [])),
        ("window", {"num_sink_tokens": 0, "use_forgetting": True}, ((128, 0, True, True), [])),
        ("window", {"window_size": 0}, ((0, 0, True, False), [])),
        ("linear", {"use_forgetting": False}, ((0, 0, True, False), [])),
        ("hybrid", {"layers": [0, 1, 2, 3]}, ((128, 1, True, False), [4, 5, 6, 7])),
        ("hybrid", {"layers": [0, 1, 2, 3], "keep_every": 2}, ((128, 1, True, False), [1, 3, 4, 5, 6, 7])),
    ],
)
def test_a_recipe_stands_for_its_options_and_what_is_given_wins(recipe, options, expected):
    assert what_it_has(converted(recipe, **options)) == expected


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("model_type", ["llama", "bert", "bart", "vit"])
def test_every_recipe_serves_decoders_and_encoders(recipe, model_type):
    """Encoders have no first tokens to keep and no order in which to forget: a recipe leaves that out for them."""
    model = converted(recipe, model_type)
    assert output_of(model, **make_inputs(model_type)).isfinite().all()
    if model_type in ("bert", "vit"):
        assert (model.config.gma["num_sink_tokens"], model.config.gma["use_forgetting"]) == (0, False)
    else:
        causal = [layer for layer in gma_layers(model).values() if layer.is_causal]
        assert all((layer.forgetting is not None) == (recipe == "linear") for layer in causal)


def test_a_recipe_whose_window_covers_the_text_is_softmax():
    tokens = make_inputs("llama")["input_ids"]
    model = converted("window")
    output = output_of(model, input_ids=tokens)
    softmax = output_of(revert_to_softmax(model), input_ids=tokens)
    torch.testing.assert_close(output, softmax, rtol=1e-4, atol=1e-4)


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"There is no recipe 'fast'. Choose one of 'hybrid', 'window', 'linear'"):
        converted("fast")


@pytest.mark.parametrize("options", [{"num_sink_tokens": 1, "window_size": 4}, {"use_forgetting": True}])
def test_what_the_user_gives_an_encoder_in_vain_is_still_refused(options):
    with pytest.raises(ValueError, match="needs causal layers"):
        converted("window", "bert", **options)


def test_the_scripts_take_recipes_and_what_is_given_beside_them():
    (arguments,) = parse_arguments(
        [ConversionArguments], ["--recipe", "hybrid", "--window_size", "16", "--use_forgetting"]
    )
    model = convert_to_gma(
        make_softmax_model("llama", num_hidden_layers=8), arguments.chosen_layers(), **arguments.options()
    )
    assert what_it_has(model) == ((16, 1, True, True), [3, 7])


def test_a_ranking_with_a_recipe_ranks_also_the_layers_that_the_recipe_would_keep():
    data = [make_inputs("llama", 4, 40)["input_ids"]]
    options = {"recipe": "hybrid", "window_size": 4, "num_components": 4}
    ranking = rank_layers(make_softmax_model("llama", num_hidden_layers=4), data, progress=False, **options)
    assert sorted(layer.index for layer in ranking) == [0, 1, 2, 3]
