# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import yaml

from gma_hf.training import GMATrainingArguments, TrainingInputError
from gma_hf.training.arguments import (
    ClassificationArguments,
    LanguageModelingArguments,
    MaskedLanguageModelingArguments,
    ModelArguments,
    parse_arguments,
    parse_config_overrides,
)

from .conftest import SCRIPTS


pytestmark = pytest.mark.quick


CLASSES = [ModelArguments, LanguageModelingArguments, GMATrainingArguments]
COMMAND = [
    *("--train_file", "a.txt", "b.txt"),
    *("--config_overrides", '{"hidden_size": 64, "layer_types": ["linear_attention", "full_attention"]}'),
    *("--learning_rate", "1e-4", "--isolate_documents", "--use_cpu", "--report_to", "none", "--output_dir", "x"),
    *("--lr_scheduler_kwargs", '{"num_cycles": 2}', "--no_logging_nan_inf_filter"),
]
VALUES = {
    "train_file": ["a.txt", "b.txt"],
    "config_overrides": {"hidden_size": 64, "layer_types": ["linear_attention", "full_attention"]},
    "learning_rate": 1e-4,
    "isolate_documents": True,
    "use_cpu": True,
    "report_to": "none",
    "output_dir": "x",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "logging_nan_inf_filter": False,
    "max_train_samples": None,
}


def as_dicts(parsed):
    dictionaries = [dict(vars(part)) for part in parsed]
    dictionaries[-1].pop("_cached_setup_devices", None)
    for name in ("accelerator_config", "distributed_state", "deepspeed_plugin", "logging_dir"):
        dictionaries[-1].pop(name, None)
    return dictionaries


def test_json_and_yaml_files_equal_the_command_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(VALUES))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(VALUES))
    # YAML takes a number without a dot and with an exponent for a string; it must become a number all the same
    (tmp_path / "b.yml").write_text(yaml.safe_dump(VALUES).replace("learning_rate: 0.0001", "learning_rate: 1e-4"))
    expected = as_dicts(parse_arguments(CLASSES, COMMAND))
    assert expected[2]["learning_rate"] == 1e-4
    for name in ("a.json", "a.yaml", "b.yml"):
        assert as_dicts(parse_arguments(CLASSES, [str(tmp_path / name)])) == expected


def test_arguments_behind_a_file_override_it(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(VALUES))
    _, data, training = parse_arguments(
        CLASSES,
        [str(tmp_path / "a.yaml"), "--learning_rate", "2", "--train_file", "c.txt", "--isolate_documents=false"],
    )
    assert (training.learning_rate, data.train_file, data.isolate_documents) == (2.0, ["c.txt"], False)


def test_an_unknown_argument_is_named_with_the_closest_known_one(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rte: 1\n")
    for argv in ([str(tmp_path / "a.yaml")], ["--train_file", "a", "--learning_rte", "1"]):
        with pytest.raises(TrainingInputError, match=r"no argument --learning_rte\. Did you mean --learning_rate"):
            parse_arguments(CLASSES, argv)


def test_unusable_argument_files_are_errors(tmp_path):
    with pytest.raises(TrainingInputError, match=r"none\.yaml' does not exist"):
        parse_arguments(CLASSES, [str(tmp_path / "none.yaml")])
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(TrainingInputError, match="Cannot read the arguments file"):
        parse_arguments(CLASSES, [str(tmp_path / "a.yaml")])
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(TrainingInputError, match="one mapping"):
        parse_arguments(CLASSES, [str(tmp_path / "a.json")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 1}, "--block_size must be at least 2"),
        ({"validation_fraction": 1.0}, "--validation_fraction must lie between"),
        ({"mlm_probability": 0.0}, "--mlm_probability must lie between"),
        ({"mixture_learning_rate": -1}, "`mixture_learning_rate` must not be negative"),
        ({"mixture_health_steps": 0}, "`mixture_health_steps` must be at least 1"),
    ],
)
def test_impossible_values_are_errors(arguments, message):
    argv = ["--train_file", "a.txt", "--use_cpu", *(f"--{name}={value}" for name, value in arguments.items())]
    with pytest.raises(TrainingInputError, match=message):
        parse_arguments([ModelArguments, MaskedLanguageModelingArguments, GMATrainingArguments], argv)


def test_config_overrides_read_values_by_their_kind():
    assert parse_config_overrides("hidden_size=64,tie_word_embeddings=False, rms_norm_eps=1e-5,hidden_act=gelu") == {
        "hidden_size": 64,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
    }
    assert parse_config_overrides(None) == {}
    with pytest.raises(TrainingInputError, match="name=value"):
        parse_config_overrides("hidden_size")
    with pytest.raises(TrainingInputError, match="JSON"):
        parse_config_overrides("{hidden_size: 64}")


@pytest.mark.parametrize(
    ("name", "data_class"),
    [
        ("train_clm", LanguageModelingArguments),
        ("train_mlm", MaskedLanguageModelingArguments),
        ("train_classification", ClassificationArguments),
    ],
)
def test_shipped_configurations_parse(name, data_class, tmp_path):
    argv = [str(SCRIPTS / "configs" / f"{name}.yaml"), "--train_file=a.txt", f"--output_dir={tmp_path}", "--use_cpu"]
    model, _, training = parse_arguments([ModelArguments, data_class, GMATrainingArguments], argv)
    assert model.preset == "gated"
    values = yaml.safe_load((SCRIPTS / "configs" / f"{name}.yaml").read_text())
    # What the file says is what the training gets, the learning rate too
    read = {key: getattr(training, key) for key in values if hasattr(training, key) and key != "report_to"}
    for key, value in read.items():
        assert getattr(value, "value", value) == pytest.approx(values[key]), key
    assert "learning_rate" in read
