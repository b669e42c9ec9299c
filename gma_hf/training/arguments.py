# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The arguments of the training commands, from the command line, a JSON file or a YAML file.

A file is translated into a command line, so all three use the same parser. Arguments after the file override the file:
`train_clm.py config.yaml --learning_rate 1e-3`.
"""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from .errors import TrainingInputError
from .options import check_options


@dataclass
class ModelArguments:
    """The model: a checkpoint to continue, or a configuration to start from scratch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint (folder or hub name) to continue from. Leave out to start fresh."}
    )
    preset: Literal["gated", "correlated", "delta", "paper"] = field(
        default="gated",
        metadata={
            "help": "From scratch: the block to train: for language models (correlated), for recall (delta), with windows (gated), or "
            "the paper's."
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "From scratch: config file, folder or hub name of any architecture, instead of a preset."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of the configuration: 'hidden_size=256,num_hidden_layers=4', or a JSON object."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer (folder or hub name). Default: the checkpoint's, or one trained on the data."},
    )
    tokenizer_vocab_size: int = field(
        default=16384, metadata={"help": "Size of the byte-level BPE vocabulary when a tokenizer is trained."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel of softmax layers: eager, sdpa, flash_attention_2, ..."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={
            "help": "Type of the weights of a continued checkpoint. For mixed precision keep it and use --bf16."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a checkpoint on the hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code from the checkpoint's or the data set's repository to run."}
    )

    def __post_init__(self):
        check_options(self, tokenizer_vocab_size=1)


@dataclass
class DataArguments:
    """The data: a data set of the Hub, or local files."""

    smallest = {}  # values of numbers that a subclass adds

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub, or a folder with one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Its split to validate on, if it exists."})
    test_split: str = field(default="test", metadata={"help": "Its split to test on, if it exists."})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Local training files, glob patterns or folders: txt, jsonl, csv, parquet, also .gz and .xz."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Local validation files, likewise."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Local test files, evaluated at the end."})
    data_format: Literal["auto", "text", "json", "csv", "parquet"] = field(
        default="auto", metadata={"help": "Format of the local files; auto goes by the extension."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training data to validate on when there is no validation data."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only this many training samples (blocks, or texts to classify)."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for validation and test."})
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenize. One is enough for most tokenizers: they use threads."},
    )

    def __post_init__(self):
        if self.dataset_name is None and self.train_file is None:
            raise TrainingInputError("There is no training data: give --dataset_name or --train_file.")
        local = [
            f"--{name}_file" for name in ("train", "validation", "test") if getattr(self, f"{name}_file") is not None
        ]
        if self.dataset_name is not None and local:
            raise TrainingInputError(f"Give either --dataset_name or local files, not both ({', '.join(local)}).")
        check_options(self, max_train_samples=1, max_eval_samples=1, preprocessing_num_workers=1, **self.smallest)
        if not 0.0 < self.validation_fraction < 1.0:
            raise TrainingInputError(
                f"--validation_fraction must lie between 0 and 1, got {self.validation_fraction}."
            )


@dataclass
class LanguageModelingArguments(DataArguments):
    """Data of language modelling: text, cut into documents and packed into blocks."""

    smallest = {"block_size": 2}

    block_size: int = field(default=1024, metadata={"help": "Tokens per block, the length the model trains on."})
    text_documents: Literal["file", "paragraph", "line"] = field(
        default="file",
        metadata={"help": "What a document is in a plain text file; an end-of-text token follows each."},
    )
    rows_are_documents: bool = field(
        default=True,
        metadata={"help": "Each row of a table is a document. False: the rows are pieces of one running text."},
    )
    isolate_documents: bool = field(
        default=False, metadata={"help": "Documents packed into one block do not see each other."}
    )


@dataclass
class CausalLanguageModelingArguments(LanguageModelingArguments):
    """Data of causal language modelling."""

    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data while training, without writing it to the disk first; needs --max_steps."},
    )


@dataclass
class MaskedLanguageModelingArguments(LanguageModelingArguments):
    """Data of masked language modelling."""

    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict."})

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.mlm_probability < 1.0:
            raise TrainingInputError(f"--mlm_probability must lie between 0 and 1, got {self.mlm_probability}.")


@dataclass
class ClassificationArguments(DataArguments):
    """Data of text classification: one text and one label per row."""

    smallest = {"max_length": 1}

    label_column: str = field(default="label", metadata={"help": "Column that holds the class."})
    max_length: int = field(default=512, metadata={"help": "Tokens per text; longer texts are cut at the end."})
    allow_missing_labels: bool = field(
        default=False, metadata={"help": "Validation and test data may lack classes that the training data has."}
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, and with enough width for an option and its explanation in one line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)


class CommandParser(HfArgumentParser):
    """
    `HfArgumentParser` with a help of one screen, and with errors of one line.

    Args:
        dataclass_types (`Sequence[type]`): the dataclasses to fill.
        command (`str`): what the user typed, such as `gma-hf train-clm`.
        description (`str`): one sentence about the command.
        common (`Sequence[str]`): names of the options that `--help` shows. `--help-all` shows all options.
        positional (`tuple[str, str]`, *optional*): a name and its explanation, for an argument without an option.
    """

    def __init__(
        self,
        dataclass_types: list[type],
        command: str | None = None,
        description: str | None = None,
        common: Sequence[str] = (),
        positional: tuple[str, str] | None = None,
    ):
        self.actions: list[argparse.Action] = []
        self.common = common
        usage = f"{command} [FILE.yaml] {positional[0].upper() + ' ' if positional else ''}[--option value ...]"
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            add_help=False,
            prog=command,
            usage=usage if command else None,
            description=description,
            formatter_class=HelpFormatter,
        )
        if positional is not None:
            self.add_argument(positional[0], metavar=positional[0].upper(), help=positional[1])

    def add_argument(self, *args, **kwargs) -> argparse.Action:
        self.actions.append(super().add_argument(*args, **kwargs))
        return self.actions[-1]

    def error(self, message: str):
        raise TrainingInputError(f"{message}. --help explains the options.")

    def expect_known(self, argv: list[str]) -> None:
        """Check the names of all options first. Otherwise a missing value would hide a misspelt option."""
        known = {name for action in self.actions for name in action.option_strings}
        for word in argv:
            name = word.split("=")[0]
            if name.startswith("--") and len(name) > 2 and name not in known:
                raise TrainingInputError(_unknown_argument(name.lstrip("-"), [n.lstrip("-") for n in known]))

    def show_help(self, everything: bool) -> None:
        """Print the common options, or all of them."""
        hidden = [] if everything else [a for a in self.actions if a.option_strings and a.dest not in self.common]
        if self.common:
            for action in hidden:
                action.help = argparse.SUPPRESS
            if hidden:
                self.epilog = (
                    f"--help-all shows {len(hidden)} more options, those of transformers.TrainingArguments among them."
                )
        for action in self.actions:
            # Names are written with an underscore and with a hyphen; one is enough to read
            action.option_strings = action.option_strings[:1]
            if action.default is None:
                action.default = argparse.SUPPRESS
            if action.option_strings and action.choices is None and action.nargs != 0:
                action.metavar = {int: "N", float: "X"}.get(action.type, "VALUE")
        self.print_help()


def parse_arguments(
    dataclass_types: list[type],
    argv: list[str] | None = None,
    command: str | None = None,
    description: str | None = None,
    common: Sequence[str] = (),
    positional: tuple[str, str] | None = None,
) -> tuple:
    """
    Parse a command line, or a JSON or YAML file with overrides after it, into dataclasses.

    Args:
        dataclass_types (`list[type]`): the dataclasses to fill.
        argv (`list[str]`, *optional*): the arguments, by default `sys.argv[1:]`. If the first is a .json, .yaml or .yml
            file, its keys are arguments; a list means several values, and `null` means the default.
        command, description, common, positional: see `CommandParser`.

    Returns:
        `tuple`: one instance per dataclass, in order; with `positional` also a namespace with its value.

    Raises:
        TrainingInputError: for an unreadable file, an unknown argument, or values that a dataclass refuses.
        SystemExit: after `--help` or `--help-all`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(dataclass_types, command, description, common, positional)
    if {"-h", "--help", "--help-all"} & set(argv):
        parser.show_help("--help-all" in argv)
        raise SystemExit(0)
    known = [f.name for cls in dataclass_types for f in dataclasses.fields(cls) if f.init]
    if argv and Path(argv[0]).suffix.lower() in (".json", ".yaml", ".yml"):
        argv = _read_arguments_file(argv[0], known) + argv[1:]
    parser.expect_known(argv)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except TrainingInputError:
        raise
    except (ValueError, TypeError) as error:
        raise TrainingInputError(str(error)) from error
    if unknown:
        raise TrainingInputError(f"There is no place for {unknown[0]!r} among the arguments. --help lists them.")
    return tuple(instances)


def parse_config_overrides(overrides: str | None) -> dict[str, Any]:
    """
    Parse `"hidden_size=256,tie_word_embeddings=false"` or a JSON object into a dictionary.

    Values are read as JSON if possible (numbers, true, false, null), and otherwise as strings.
    """
    if not overrides:
        return {}
    if overrides.lstrip().startswith("{"):
        try:
            return json.loads(overrides)
        except json.JSONDecodeError as error:
            raise TrainingInputError(f"--config_overrides is not a valid JSON object: {error}") from error
    values = {}
    for item in overrides.split(","):
        name, equals, value = item.partition("=")
        if not equals:
            raise TrainingInputError(
                f"--config_overrides has {item!r} where 'name=value' is expected. For lists give a JSON object."
            )
        try:
            values[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            lowered = value.strip()
            values[name.strip()] = {"True": True, "False": False, "None": None}.get(lowered, lowered)
    return values


def _read_arguments_file(name: str, known: list[str]) -> list[str]:
    path = Path(name)
    if not path.is_file():
        raise TrainingInputError(f"The arguments file {name!r} does not exist.")
    try:
        # JSON is not read as YAML, because YAML reads 1e-4 as a string
        values = (
            json.loads(path.read_text("utf-8")) if path.suffix == ".json" else yaml.safe_load(path.read_text("utf-8"))
        )
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise TrainingInputError(f"Cannot read the arguments file {name!r}: {error}") from error
    if not isinstance(values, dict):
        raise TrainingInputError(f"The arguments file {name!r} must hold one mapping of names to values.")
    argv = []
    for key, value in values.items():
        if key not in known:
            raise TrainingInputError(_unknown_argument(str(key), known))
        if value is None:
            continue
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        else:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
    return argv


def _unknown_argument(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"There is no argument --{name}." + (f" Did you mean --{close[0]}?" if close else " --help lists them.")
