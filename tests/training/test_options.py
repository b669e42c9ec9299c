# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Nonsense in any dataclass of options, and in the keywords of a conversion, is a `ValueError` that names the option."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import types
import typing
from typing import Literal

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import gma_hf
from gma_hf import convert_to_gma
from gma_hf.conversion import calibrate, rank_layers
from gma_hf.conversion.config import GMAConversionConfig
from gma_hf.training.arguments import DataArguments
from gma_hf.training.options import TRAINING_NUMBERS


# What a class cannot do without
NEEDED = {
    "SourceArguments": {"model_name_or_path": "model"},
    "OutputArguments": {"output_dir": "out"},
    "PublishingArguments": {"repo_id": "user/name"},
    "AnalysisArguments": {"text": ["a.txt"]},
    "GMATrainingArguments": {"output_dir": "out", "use_cpu": True, "report_to": "none"},
    "GMADistillationArguments": {"output_dir": "out", "use_cpu": True, "report_to": "none"},
}
NONSENSE = {
    int: [True, 2.5, math.nan, math.inf, "3", "many", -2, 2**63, [3]],
    float: [True, math.nan, math.inf, -math.inf, "0.1", -1.0, [0.1]],
    bool: [1, 0, "no", 0.0, math.nan],
    str: [3, True, 0.5, ["a"]],
    Literal: ["nonsense", 3, True],
    list: ["abc", 3, [1], [None], True],
}


def options_classes() -> list[type]:
    """Every dataclass of the package that holds options of a user, wherever it is."""
    found = set()
    for module in pkgutil.walk_packages(gma_hf.__path__, "gma_hf."):
        if module.name.startswith("gma_hf.serving") or ".triton" in module.name or module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__.startswith("gma_hf."):
                if value.__name__.endswith("Arguments"):
                    found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


def needed(cls: type) -> dict[str, object]:
    if issubclass(cls, DataArguments):
        return {"train_file": ["a.txt"]}
    return NEEDED.get(cls.__name__, {})


def kind_of(hint) -> type | object:
    """int, float, bool, str, list or Literal."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return typing.get_origin(hint) or hint


def cases() -> list[tuple[type, str, object]]:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    result = []
    for cls in options_classes():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not (issubclass(cls, TrainingArguments) and field.name in inherited):
                result += [(cls, field.name, value) for value in NONSENSE[kind_of(hints[field.name])]]
    return result


def test_all_classes_are_looked_at():
    names = {cls.__name__ for cls in options_classes()}
    assert names >= {*NEEDED, "ModelArguments", "ConversionArguments", "RecipeArguments", "CardArguments"}
    for cls in options_classes():
        cls(**needed(cls))


def test_nonsense_in_any_field_is_refused_by_its_name():
    accepted = []
    for cls, name, value in cases():
        try:
            cls(**needed(cls) | {name: value})
        except ValueError as error:
            if name not in str(error):
                accepted.append(f"{cls.__name__}({name}={value!r}) is refused without its name: {error}")
        else:
            accepted.append(f"{cls.__name__}({name}={value!r}) is accepted")
    assert accepted == []


@pytest.mark.parametrize("name", TRAINING_NUMBERS)
@pytest.mark.parametrize("cls", [cls for cls in options_classes() if issubclass(cls, TrainingArguments)])
def test_nonsense_in_numbers_of_transformers_is_refused_too(cls, name):
    kind, smallest = TRAINING_NUMBERS[name]
    for value in [True, math.nan, math.inf, "3", smallest - 1, [1], *([2.5, 2**63] if kind is int else [])]:
        with pytest.raises(ValueError, match=name):
            cls(**needed(cls) | {name: value})


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


KEYWORDS = {
    **dict.fromkeys(("num_components", "window_size", "num_sink_tokens", "keep_every"), NONSENSE[int]),
    **dict.fromkeys(("use_routing_projections", "use_forgetting", "undo_rotation"), NONSENSE[bool]),
    **dict.fromkeys(
        ("undo_rotation_beyond", "variance_floor", "read_eps", "mean_init_std", "variance_init"), NONSENSE[float]
    ),
    "recipe": ["nonsense", 3, True, ["window"]],
    "layers": ["nonsense", 2**63, [2**63], [0.5], [True], math.nan, math.inf, -0.5, 1.5, 0.0, True, [], {}, [None]],
}


def test_nonsense_in_a_keyword_of_a_conversion_is_refused_by_its_name():
    model = tiny_llama()
    wrong = []
    assert KEYWORDS.keys() == inspect.signature(convert_to_gma).parameters.keys() - {"model", "example_inputs"}
    for name, values in KEYWORDS.items():
        for value in values:
            try:
                convert_to_gma(model, **{name: value})
            except ValueError as error:
                if name not in str(error) and value not in ([], {}):
                    wrong.append(f"{name}={value!r} is refused without its name: {error}")
            else:
                wrong.append(f"{name}={value!r} is accepted")
            assert type(model) is LlamaForCausalLM or wrong, "what refuses changes nothing"
            model = model if type(model) is LlamaForCausalLM else tiny_llama()
    assert wrong == []


def test_nonsense_in_a_keyword_of_calibrate_is_refused_by_its_name():
    model = convert_to_gma(tiny_llama(), num_components=4)
    whole = ("max_tokens", "num_samples", "evaluation_tokens", "batch_size", "em_steps", "seed")
    nonsense = {**dict.fromkeys(whole, NONSENSE[int]), "progress": NONSENSE[bool]}
    assert nonsense.keys() == inspect.signature(calibrate).parameters.keys() - {"model", "data"}
    for name, values in nonsense.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                calibrate(model, [[3, 4, 5, 6]], **{name: value})
    for name in ("max_tokens", "progress"):
        for value in nonsense[name]:
            with pytest.raises(ValueError, match=name):
                rank_layers(tiny_llama(), [[3, 4, 5, 6]], **{name: value})


def test_nonsense_in_a_saved_conversion_is_refused_by_its_name():
    for field in dataclasses.fields(GMAConversionConfig):
        values = {"layers": [3, "a", [1], {"a": 1}], "softmax_layers": [3, "a", [1], True]}
        for value in (
            values.get(field.name) or NONSENSE[kind_of(typing.get_type_hints(GMAConversionConfig)[field.name])]
        ):
            with pytest.raises(ValueError, match=field.name):
                GMAConversionConfig(**{field.name: value})
