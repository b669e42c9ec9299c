# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What the training commands share: arguments, start, model, and the steps from training to model card."""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...configuration import GMAConfig
from ...training.arguments import DataArguments, ModelArguments, parse_arguments, parse_config_overrides
from ...training.cards.frame import describe_data, without_folder
from ...training.cards.model_card import TrainingRecord, write_model_card, write_results
from ...training.checkpoints import all_checkpoints, checkpoint_to_resume, expect_resumable, find_last_checkpoint
from ...training.errors import TrainingInputError, why_not_loaded
from ...training.files import resolve_files
from ...training.fingerprint import differences, fingerprint
from ...training.run_folder import RunFolder, read_run
from ...training.text.tokenization import get_tokenizer
from ...training.trainer import GMATrainer, GMATrainingArguments
from .progress import show_progress


logger = logging.getLogger(__name__)


# Options that `--help` of every training command shows
COMMON = (
    "train_file",
    "validation_file",
    "test_file",
    "dataset_name",
    "dataset_config_name",
    "output_dir",
    "model_name_or_path",
    "preset",
    "config_overrides",
    "tokenizer_vocab_size",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "torch_compile",
    "overwrite_output_dir",
)


@dataclass
class Job:
    """A started training: its arguments, its folder, and the checkpoint to resume from, if there is one."""

    model_args: ModelArguments
    data_args: DataArguments
    args: GMATrainingArguments
    run: RunFolder
    checkpoint: str | None

    def record(
        self, trainer: GMATrainer, details: dict[str, Any], data: dict[str, Any], **values: Any
    ) -> TrainingRecord:
        """The record for the card. `details` and `data` belong to the task; `values` are further fields."""
        source = self.model_args.model_name_or_path
        preset = None if source or self.model_args.config_name else self.model_args.preset
        return TrainingRecord(
            data={**describe_data(self.data_args), **data},
            details={"steps": trainer.state.global_step, **details, "preset": preset},
            base_model=source and without_folder(source),
            **values,
        )


def run_training(
    command: str,
    data_arguments: type[DataArguments],
    argv: list[str] | None,
    description: str,
    common: tuple[str, ...],
    train: Callable[[Job], None],
) -> None:
    """
    Read the arguments of a training command, and train unless the output folder has the finished run.

    Args:
        command (`str`): name of the verb.
        data_arguments (`type`): the dataclass of the data.
        argv (`list[str]`, *optional*): the command line; by default `sys.argv[1:]`.
        description (`str`): the docstring of the command. `--help` shows its first line.
        common (`tuple[str, ...]`): options that `--help` shows in addition to `COMMON`.
        train (`Callable`): loads the data, makes tokenizer and model, trains, and reports.
    """
    model_args, data_args, args = parse_arguments(
        [ModelArguments, data_arguments, GMATrainingArguments],
        argv,
        command=f"gma-hf {command}",
        description=description.splitlines()[0],
        common=(*COMMON, *common),
    )
    run, checkpoint = start(command, model_args, data_args, args)
    if not run.is_finished:
        with run:
            train(Job(model_args, data_args, args, run, checkpoint))


def set_up_logging(is_main: bool = True) -> None:
    """Log with time and origin. This package logs at INFO on the main process, and errors only on other processes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("gma_hf").setLevel(logging.INFO if is_main else logging.ERROR)


def files_of(data: DataArguments) -> dict[str, list[str] | None]:
    """The files of each split, for the fingerprint of a run; `None` for splits without files."""
    names = [f"{split}_file" for split in ("train", "validation", "test")]
    return {name: (patterns := getattr(data, name)) and resolve_files(patterns) for name in names}


def start(
    command: str, model_args: ModelArguments, data_args: DataArguments, args: GMATrainingArguments
) -> tuple[RunFolder, str | None]:
    """
    Set up logging and seeds, check the output folder, and find the checkpoint to resume from.

    Args:
        command (`str`): name of the command.
        model_args (`ModelArguments`): the arguments of the model.
        data_args (`DataArguments`): the arguments of the data.
        args (`GMATrainingArguments`): the training arguments.

    Returns:
        `tuple`: the folder of the run, and the checkpoint to resume from, or `None` to start anew. The checkpoint is the one
        that the user named, otherwise the last complete checkpoint in `output_dir`, unless `overwrite_output_dir` is set.

    Raises:
        TrainingInputError: if there is no such checkpoint, or the folder has something else than this run.
    """
    is_main = args.process_index == 0
    set_up_logging(is_main)
    datasets.utils.logging.set_verbosity_warning() if is_main else datasets.utils.logging.set_verbosity_error()
    transformers.set_seed(args.seed)

    run = fingerprint(
        command,
        (model_args, data_args, args),
        {**files_of(data_args), "model_name_or_path": model_args.model_name_or_path},
        num_processes=args.world_size,
    )
    asked = args.resume_from_checkpoint
    if isinstance(asked, str) and asked.lower() in ("true", "false"):
        asked = asked.lower() == "true"
    if isinstance(asked, str):
        return _resume_from(Path(asked), run, args)
    folder = RunFolder(args.output_dir, run, args.overwrite_output_dir, is_main)
    last = None if args.overwrite_output_dir or folder.is_finished else checkpoint_to_resume(args.output_dir)
    if asked is True and last is None and not folder.is_finished:
        raise TrainingInputError(f"There is no checkpoint to resume from in {args.output_dir!r}.")
    if asked is False and last is not None:
        raise TrainingInputError(
            f"{args.output_dir!r} holds checkpoints of this run. Leave out --resume_from_checkpoint to go on from the last "
            "one, or pass --overwrite_output_dir to start anew."
        )
    if last is not None:
        logger.info("Resuming from %s; pass --overwrite_output_dir to start anew.", last)
    return folder, last


def _resume_from(checkpoint: Path, run: dict[str, Any], args: GMATrainingArguments) -> tuple[RunFolder, str]:
    """The folder of a run that continues from the checkpoint that the user named."""
    try:
        expect_resumable(checkpoint)
    except TrainingInputError as error:
        last = find_last_checkpoint(args.output_dir)
        raise TrainingInputError(
            f"{error}" + (f" The last one in the output folder is {last!r}." if last else "")
        ) from error
    before = read_run(checkpoint.resolve().parent)
    if before is None:
        logger.warning("%s does not say of which run it is, so its options and data cannot be compared.", checkpoint)
    elif found := differences(before, run):
        raise TrainingInputError(
            f"{str(checkpoint)!r} belongs to another run: {'; '.join(found)}. Give the same options and data, or start a new "
            f"training with --model_name_or_path {checkpoint} and another --output_dir."
        )
    is_inside = checkpoint.resolve().parent == Path(args.output_dir).resolve()
    is_main = args.process_index == 0
    return RunFolder(args.output_dir, run, args.overwrite_output_dir or is_inside, is_main), str(checkpoint)


def prepare_tokenizer(job: Job, dataset: Dataset, with_mask: bool = False) -> PreTrainedTokenizerBase:
    """Load the requested tokenizer or the tokenizer of the checkpoint, or train a tokenizer."""
    model_args, args = job.model_args, job.args
    name = model_args.tokenizer_name or job.checkpoint or model_args.model_name_or_path
    options = {"trust_remote_code": model_args.trust_remote_code}
    if name == model_args.model_name_or_path:
        options["revision"] = model_args.revision
    if name is None:
        folder = job.run.beside("tokenizer")
        with args.main_process_first(desc="training the tokenizer"):
            if args.local_process_index == 0:
                trained = get_tokenizer(None, dataset, model_args.tokenizer_vocab_size, with_mask)
                trained.save_pretrained(folder)
        name, options = str(folder), {}
    return get_tokenizer(name, dataset, model_args.tokenizer_vocab_size, with_mask, **options)


def build_model(
    auto_class: type,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    is_causal: bool | None = None,
    **config_values: Any,
) -> PreTrainedModel:
    """
    Create a model from scratch, or load the checkpoint to continue from.

    Args:
        auto_class (`type`): the Auto class of the task.
        model_args (`ModelArguments`): the arguments of the model.
        tokenizer (`PreTrainedTokenizerBase`): its size and special tokens go into a new configuration. Embeddings grow to
            its size if needed.
        is_causal (`bool`, *optional*): direction of a new GMA model; by default the preset and the overrides decide.
        config_values (`Any`): further fields of the configuration, such as the names of the classes.

    Raises:
        TrainingInputError: if the checkpoint or the configuration cannot be loaded, or has impossible values.
    """
    overrides = parse_config_overrides(model_args.config_overrides)
    source = model_args.model_name_or_path
    load_options = {"trust_remote_code": model_args.trust_remote_code}
    try:
        if source is not None:
            model = auto_class.from_pretrained(
                source,
                dtype=model_args.dtype,
                revision=model_args.revision,
                attn_implementation=model_args.attn_implementation,
                **load_options,
                **overrides,
                **config_values,
            )
        else:
            config = _new_config(model_args, tokenizer, overrides, is_causal, config_values)
            if model_args.attn_implementation is not None:
                load_options["attn_implementation"] = model_args.attn_implementation
            model = auto_class.from_config(config, **load_options)
    except (OSError, ValueError, TypeError) as error:
        reason = error if source is None else why_not_loaded(source, error)
        raise TrainingInputError(f"Cannot make the model: {reason}") from error
    except Exception as error:
        # `@strict` configurations wrap the reason in exceptions of huggingface_hub that are no ValueErrors
        if type(error).__module__.startswith("huggingface_hub"):
            raise TrainingInputError(f"Cannot make the model: {error}") from error
        raise
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        logger.info("The embeddings grow to the %d tokens of the tokenizer.", len(tokenizer))
        model.resize_token_embeddings(len(tokenizer))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def check_length(model: PreTrainedModel, length: int, option: str) -> None:
    """
    Check that a model with learned positions can take sequences of this length.

    Raises:
        TrainingInputError: if it has too few positions.
    """
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        is_table = isinstance(module, nn.Embedding) and re.search(r"position_embed|embed_position|^wpe$", leaf)
        if is_table and module.num_embeddings < length:
            raise TrainingInputError(
                f"{option} is {length}, but the model has learned positions for {module.num_embeddings} tokens only. "
                f"Choose a smaller {option}, or for a new model pass --config_overrides max_position_embeddings={length}."
            )


def limit(dataset: Dataset, num_samples: int | None, shuffle_seed: int | None = None) -> Dataset:
    """The first samples of a data set, or random samples with a seed; `None` means all samples in their order."""
    if num_samples is None or num_samples >= len(dataset):
        return dataset
    if shuffle_seed is not None:
        dataset = dataset.shuffle(seed=shuffle_seed)
    return dataset.select(range(num_samples))


def train_and_report(
    trainer: GMATrainer,
    job: Job,
    test_dataset: Dataset | None,
    finish_metrics: Callable[[dict[str, float], str], dict[str, float]],
    record: Callable[[dict[str, float]], TrainingRecord],
) -> dict[str, float]:
    """
    Train, save the model, evaluate it on validation and test data, and write the model card and `results.json`.

    Args:
        trainer (`GMATrainer`): the trainer, ready to start.
        job (`Job`): the training.
        test_dataset (`Dataset`, *optional*): evaluated at the end.
        finish_metrics (`Callable`): adds metrics that the trainer cannot know, for a split (`eval` or `test`).
        record (`Callable`): makes the record of the run from all metrics.

    Returns:
        `dict[str, float]`: all metrics.
    """
    args, run, checkpoint = trainer.args, job.run, job.checkpoint
    if args.overwrite_output_dir and run.is_main and checkpoint is None:
        _delete_checkpoints(args.output_dir)
    run.begin()
    show_progress(trainer)
    try:
        trained = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as error:
        last = find_last_checkpoint(args.output_dir)
        where = f"from {last}" if last else "from the beginning, for no checkpoint had been written"
        raise KeyboardInterrupt(f"The same command goes on {where}.") from error
    trainer.save_model()
    trainer.save_state()
    metrics = dict(trained.metrics)
    for split, dataset in (("eval", None), ("test", test_dataset)):
        if split == "test" and dataset is None:
            continue
        scores = finish_metrics(trainer.evaluate(dataset, metric_key_prefix=split), split)
        trainer.log_metrics(split, scores)
        metrics.update(scores)
    metrics.pop("epoch", None)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        write_results(args.output_dir, args, model, record(metrics))
        write_model_card(args.output_dir, args, model, record(metrics))
        run.finish()
        logger.info("Model, README.md and results.json are in %s.", args.output_dir)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return metrics


def _delete_checkpoints(output_dir: str) -> None:
    for folder in all_checkpoints(output_dir):
        logger.info("Deleting %s, a checkpoint of an earlier run.", folder)
        shutil.rmtree(folder)


def _new_config(
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    overrides: dict[str, Any],
    is_causal: bool | None,
    config_values: dict[str, Any],
) -> PreTrainedConfig:
    values = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **config_values,
        **overrides,
    }
    if values["vocab_size"] < len(tokenizer):
        raise ValueError(f"vocab_size is {values['vocab_size']}, but the tokenizer has {len(tokenizer)} tokens.")
    if model_args.config_name is None:
        known = GMAConfig()
    else:
        known = AutoConfig.from_pretrained(model_args.config_name, trust_remote_code=model_args.trust_remote_code)
    unknown = [name for name in overrides if not hasattr(known, name)]
    if unknown:
        raise ValueError(f"{type(known).__name__} has no field {unknown[0]!r}; its documentation lists the names.")
    if is_causal is not None and known.model_type == GMAConfig.model_type:
        values = {"is_causal": is_causal, **values}
    if model_args.config_name is None:
        return GMAConfig.from_preset(model_args.preset, **values)
    return AutoConfig.from_pretrained(model_args.config_name, trust_remote_code=model_args.trust_remote_code, **values)
