# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What the commands `convert` and `distill` share: arguments, models, data, and the first conversion."""

import copy
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ...conversion.calibration.calibrate import calibrate
from ...conversion.calibration.sensitivity import choose_layers, rank_layers
from ...conversion.checkpoints.install import gma_layers
from ...conversion.convert import convert_to_gma
from ...training.arguments import LanguageModelingArguments, parse_arguments
from ...training.cards.frame import describe_command, describe_data, device_name, versions, without_folder
from ...training.errors import TrainingInputError, why_not_loaded
from ...training.fingerprint import fingerprint
from ...training.options import check_options
from ...training.text.data import load_text_splits
from ...training.text.packing import PackedCollator, pack_splits
from .training import files_of, limit


logger = logging.getLogger(__name__)

AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "feature-extraction": "AutoModel",
}
# Options of both commands that `--help` shows
COMMON = (
    "model_name_or_path",
    "train_file",
    "dataset_name",
    "output_dir",
    "task",
    "layers",
    "keep",
    "keep_every",
    "num_components",
    "window_size",
    "num_sink_tokens",
    "calibration_tokens",
    "block_size",
)


@dataclass
class SourceArguments:
    """The model to convert."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the model to convert; may stand first."})
    task: Literal["text-generation", "fill-mask", "feature-extraction"] = field(
        default="text-generation",
        metadata={"help": "Task of the model; feature-extraction for a model without a head."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights. For mixed precision keep it and use --bf16."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel of the teacher and of softmax layers that are kept."}
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository to run."})

    def __post_init__(self):
        check_options(self)


@dataclass
class ConversionArguments:
    """The options of the conversion, and its calibration."""

    layers: list[str] | None = field(
        default=None,
        metadata={"help": "Layers to convert: indices, names, one fraction, or 'auto' with --keep. Default: all."},
    )
    keep: int | None = field(
        default=None, metadata={"help": "With --layers auto: how many of the most sensitive layers stay softmax."}
    )
    keep_every: int | None = field(default=None, metadata={"help": "Every n-th of the layers stays softmax."})
    recipe: Literal["hybrid", "window", "linear"] | None = field(
        default=None,
        metadata={"help": "Options that belong together, see docs/conversion.md. Other options override them."},
    )
    num_components: int = field(default=64, metadata={"help": "Gaussian components per head."})
    window_size: int | None = field(
        default=None,
        metadata={"help": "Number of nearest tokens that are seen exactly, by softmax; 0 for none. Default: 0."},
    )
    num_sink_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Number of first tokens that stay visible behind the window; causal models only. Default: 0."
        },
    )
    use_routing_projections: bool = field(
        default=False, metadata={"help": "Learned maps of queries and keys before they are routed."}
    )
    use_forgetting: bool = field(default=False, metadata={"help": "A learned forgetting gate; causal models only."})
    undo_rotation: bool | None = field(
        default=None,
        metadata={"help": "Route queries and keys without slow rotary positions. Default: wherever possible."},
    )
    undo_rotation_beyond: float | None = field(
        default=None,
        metadata={
            "help": "Rotations that need more than this number of tokens for a full turn are slow; 0: all. Default: 1024 with "
            "--window_size, 0 without."
        },
    )
    calibration_tokens: int = field(
        default=200_000, metadata={"help": "Tokens that the mixtures are fitted to; 0 leaves them random."}
    )
    calibration_samples: int = field(default=4096, metadata={"help": "How many of these tokens to keep per layer."})
    calibration_batch_size: int = field(default=8, metadata={"help": "Blocks per batch during the collection."})
    ranking_tokens: int = field(default=16_384, metadata={"help": "With --layers auto: tokens for the ranking."})

    def __post_init__(self):
        least = {"keep_every": 2, "num_components": 1, "calibration_samples": 1, "ranking_tokens": 1}
        check_options(self, calibration_batch_size=1, **least)
        if (self.keep is not None) != (self.layers == ["auto"]):
            raise TrainingInputError("--layers auto and --keep (how many layers stay softmax) go together.")

    def options(self) -> dict[str, Any]:
        """The arguments of `convert_to_gma`, except `layers`."""
        names = ("num_components", "window_size", "num_sink_tokens", "use_routing_projections", "use_forgetting")
        names = (*names, "undo_rotation", "undo_rotation_beyond", *(("recipe",) if self.recipe else ()))
        options = {name: getattr(self, name) for name in names}
        # A flag that is not given does not override the recipe
        return {name: None if value is False and name.startswith("use_") else value for name, value in options.items()}

    def chosen_layers(self) -> Any:
        """`layers` in the form of `convert_to_gma`."""
        if self.layers is None or self.layers == ["auto"]:
            return None
        if len(self.layers) == 1 and "." in self.layers[0] and self.layers[0].replace(".", "").isdigit():
            return float(self.layers[0])
        return [int(entry) if entry.lstrip("-").isdigit() else entry for entry in self.layers]


class PreparedData(NamedTuple):
    """Tokenized data, and the collator for its batches."""

    train: Dataset
    validation: Dataset
    collator: Any
    test: Dataset | None = None


def parse_model_arguments(
    command: str, dataclass_types: Sequence[type], argv: list[str] | None, description: str, common: Sequence[str]
) -> tuple[Any, ...]:
    """
    Read the arguments of a command. The name of a model may be the first argument, or follow the arguments file.

    Args:
        command (`str`): name of the verb.
        dataclass_types (`Sequence[type]`): the dataclasses of the arguments.
        argv (`list[str]`, *optional*): the command line; by default `sys.argv[1:]`.
        description (`str`): the docstring of the command. `--help` shows its first line.
        common (`Sequence[str]`): options that `--help` shows in addition to `COMMON`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    is_file = bool(argv) and Path(argv[0]).suffix.lower() in (".json", ".yaml", ".yml")
    place = 1 if is_file else 0
    if len(argv) > place and not argv[place].startswith("-"):
        argv[place : place + 1] = ["--model_name_or_path", argv[place]]
    return parse_arguments(
        list(dataclass_types),
        argv,
        command=f"gma-hf {command}",
        description=description.splitlines()[0],
        common=(*COMMON, *common),
    )


def results_of(
    source: SourceArguments, data: LanguageModelingArguments, report: dict[str, Any], args: TrainingArguments
) -> dict[str, Any]:
    """The facts about a conversion for `results.json` and for the card."""
    return {
        "base_model": without_folder(source.model_name_or_path),
        "task": source.task,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": describe_command(sys.argv),
        "conversion": report,
        "data": describe_data(data),
        "device": device_name(args),
        "versions": versions(),
    }


def load_source(source: SourceArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model to convert and its tokenizer.

    Raises:
        TrainingInputError: if they cannot be loaded.
    """
    auto_class = getattr(transformers, AUTO_CLASSES[source.task])
    options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    name = source.model_name_or_path
    try:
        model = auto_class.from_pretrained(
            name, dtype=source.dtype, attn_implementation=source.attn_implementation, **options
        )
        name = source.tokenizer_name or source.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = why_not_loaded(name, error)
        raise TrainingInputError(f"Cannot load {name!r}: {reason}") from error
    check_tokenizer(source, model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def check_tokenizer(source: SourceArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that the tokenizer belongs to the model. Otherwise the same number would mean another token.

    Raises:
        TrainingInputError: if it does not.
    """
    num_tokens = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_tokens:
        raise TrainingInputError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {num_tokens}. Give the tokenizer that the model was trained "
            "with."
        )
    if source.tokenizer_name is None:
        return
    try:
        own = AutoTokenizer.from_pretrained(source.model_name_or_path, trust_remote_code=source.trust_remote_code)
    except Exception:
        return  # the model comes without a tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise TrainingInputError(
            f"The tokenizer of {source.tokenizer_name!r} differs from that of {source.model_name_or_path!r}: the same number "
            "means different tokens. Leave --tokenizer_name out."
        )


def check_output(source: SourceArguments, output_dir: str) -> None:
    """
    Check that the output folder is not the folder of the model to convert.

    Raises:
        TrainingInputError: if it is.
    """
    if Path(source.model_name_or_path).resolve() == Path(output_dir).resolve():
        raise TrainingInputError(
            f"The converted model would overwrite {source.model_name_or_path!r}. Choose another --output_dir."
        )


def run_of(
    command: str, arguments: Sequence[Any], source: SourceArguments, data: LanguageModelingArguments
) -> dict[str, Any]:
    """The fingerprint of a run of a command, see [`fingerprint`]."""
    return fingerprint(command, arguments, {**files_of(data), "model_name_or_path": source.model_name_or_path})


def prepare_data(
    arguments: LanguageModelingArguments,
    source: SourceArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> PreparedData:
    """The text in the form of the task of the model: packed blocks for a language model, single texts for an encoder."""
    splits = load_text_splits(arguments, seed, source.trust_remote_code)
    if source.task == "text-generation":
        packed = pack_splits(splits, tokenizer, arguments)
        prepared = {split: text.blocks for split, text in packed.items()}
        collator = PackedCollator(tokenizer.pad_token_id)
    else:

        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            return dict(tokenizer(batch["text"], truncation=True, max_length=arguments.block_size))

        prepared = {
            split: dataset.filter(lambda text: bool(text and text.strip()), input_columns="text").map(
                tokenize, batched=True, remove_columns=dataset.column_names, desc=f"Tokenizing ({split})"
            )
            for split, dataset in splits.items()
        }
        collator = DataCollatorWithPadding(tokenizer)
    validation = limit(prepared["validation"], arguments.max_eval_samples)
    test = limit(prepared["test"], arguments.max_eval_samples) if "test" in prepared else None
    return PreparedData(limit(prepared["train"], arguments.max_train_samples), validation, collator, test)


def convert_and_calibrate(
    model: PreTrainedModel, data: PreparedData, arguments: ConversionArguments, seed: int, progress: bool = True
) -> dict[str, Any]:
    """
    Convert a model in place as the arguments say, and fit its mixtures.

    Returns:
        `dict`: the converted layers, the ranking if there is one, and the report of the calibration; for JSON.
    """
    batch_size = arguments.calibration_batch_size
    loader = DataLoader(data.train.shuffle(seed=seed), batch_size=batch_size, collate_fn=data.collator)
    options = {"num_samples": arguments.calibration_samples, "seed": seed, "progress": progress}
    report: dict[str, Any] = {}
    layers = arguments.chosen_layers()
    try:
        if arguments.layers == ["auto"]:
            ranking = rank_layers(
                model,
                loader,
                max_tokens=arguments.ranking_tokens,
                calibration_options={**options, "max_tokens": arguments.ranking_tokens},
                progress=progress,
                **arguments.options(),
            )
            report["ranking"] = [layer._asdict() for layer in ranking]
            layers = choose_layers(ranking, arguments.keep)
        convert_to_gma(model, layers, keep_every=arguments.keep_every, **arguments.options())
        report["converted_layers"] = list(gma_layers(model))
        if arguments.calibration_tokens > 0:
            calibration = calibrate(model, loader, max_tokens=arguments.calibration_tokens, **options)
            report["calibration"] = calibration.to_dict()
            logger.info(
                "Error of the attention's output, mean over the layers: %.3f with random mixtures, %.3f calibrated.",
                calibration.mean("error_before"),
                calibration.mean("error_after"),
            )
    except (ValueError, MemoryError) as error:
        raise TrainingInputError(str(error)) from error
    report["options"] = asdict(arguments)
    return report


def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of prompts, including the prompts."""
    was_training = model.training
    model.eval()
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    model.train(was_training)
    return texts


def stage_arguments(args: Any, stage: str, max_steps: int, learning_rate: float, **changes: Any) -> Any:
    """The arguments of one stage, from the arguments that all stages share."""
    stage_args = copy.copy(args)
    for name, value in {"stage": stage, "max_steps": max_steps, "learning_rate": learning_rate, **changes}.items():
        setattr(stage_args, name, value)
    return stage_args
