# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts have in common: start, model, and the run from training to the model card."""

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration import GMAConfig
from .arguments import ModelArguments, parse_config_overrides
from .cards.model_card import TrainingRecord, write_model_card, write_results
from .errors import NonFiniteTrainingError, TrainingInputError
from .text.tokenization import get_tokenizer
from .trainer import GMATrainer, GMATrainingArguments, find_last_checkpoint


logger = logging.getLogger(__name__)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; input errors and NaNs end it with one message and exit code 1, without a traceback."""
    try:
        main()
    except (TrainingInputError, NonFiniteTrainingError) as error:
        sys.exit(f"error: {error}")


def set_up_logging(is_main: bool = True) -> None:
    """Log with time and origin: what this package says, of processes beside the main one only errors."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("gma_hf").setLevel(logging.INFO if is_main else logging.ERROR)


def start(args: GMATrainingArguments) -> str | None:
    """Set up logging and seeds, and find out where to resume.

    Args:
        args: the training arguments.

    Returns:
        The checkpoint to resume from, or None to start anew: the one asked for, otherwise the last complete one in
        `output_dir`, unless `overwrite_output_dir`: then the old checkpoints are deleted, so that none of them can
        be taken for one of the new run.

    Raises:
        TrainingInputError: if there is no such checkpoint, or a trained model without checkpoints would be overwritten.
    """
    is_main = args.process_index == 0
    set_up_logging(is_main)
    datasets.utils.logging.set_verbosity_warning() if is_main else datasets.utils.logging.set_verbosity_error()
    transformers.set_seed(args.seed)

    asked = args.resume_from_checkpoint
    last = find_last_checkpoint(args.output_dir)
    if isinstance(asked, str) and asked.lower() in ("true", "false"):
        asked = asked.lower() == "true"
    if isinstance(asked, str):
        if not os.path.isfile(os.path.join(asked, "trainer_state.json")):
            raise TrainingInputError(
                f"{asked!r} is not a complete checkpoint (it has no trainer_state.json)."
                + (f" The last one in the output folder is {last!r}." if last else "")
            )
        return asked
    if asked is True and last is None:
        raise TrainingInputError(f"There is no checkpoint to resume from in {args.output_dir!r}.")
    if asked is False:
        return None
    if args.overwrite_output_dir:
        if is_main:
            _delete_checkpoints(args.output_dir)
        return None
    if last is None and os.path.isfile(os.path.join(args.output_dir, "config.json")):
        raise TrainingInputError(
            f"{args.output_dir!r} already holds a trained model. Choose another --output_dir, or pass "
            "--overwrite_output_dir."
        )
    if last is not None:
        logger.info("Resuming from %s; pass --overwrite_output_dir to start anew.", last)
    return last


def prepare_tokenizer(
    model_args: ModelArguments,
    args: GMATrainingArguments,
    dataset: Dataset,
    checkpoint: str | None,
    with_mask: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer asked for, or that of the checkpoint, or train one and keep it in `output_dir`."""
    name = model_args.tokenizer_name or checkpoint or model_args.model_name_or_path
    options = {"trust_remote_code": model_args.trust_remote_code}
    if name == model_args.model_name_or_path:
        options["revision"] = model_args.revision
    if name is None:
        with args.main_process_first(desc="training the tokenizer"):
            if args.local_process_index == 0:
                trained = get_tokenizer(None, dataset, model_args.tokenizer_vocab_size, with_mask)
                trained.save_pretrained(args.output_dir)
        name, options = args.output_dir, {}
    return get_tokenizer(name, dataset, model_args.tokenizer_vocab_size, with_mask, **options)


def build_model(
    auto_class: type,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    is_causal: bool | None = None,
    **config_values: Any,
) -> PreTrainedModel:
    """Create a model from scratch, or load the checkpoint to continue from.

    Args:
        auto_class: the Auto class of the task.
        model_args: see `ModelArguments`.
        tokenizer: its size and special tokens go into a new configuration; embeddings grow to its size if needed.
        is_causal: direction of a new GMA model; None leaves it to the preset and the overrides.
        config_values: further fields of the configuration, such as the names of the classes.

    Raises:
        TrainingInputError: if the checkpoint or configuration cannot be loaded, or has impossible values.
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
        raise TrainingInputError(f"Cannot make the model: {error}") from error
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
    """Check that a model with a table of learned positions can take sequences of a length.

    Raises:
        TrainingInputError: if the table is shorter.
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
    """Return the first samples of a data set, or random ones with a seed; None means all, in their order."""
    if num_samples is None or num_samples >= len(dataset):
        return dataset
    if shuffle_seed is not None:
        dataset = dataset.shuffle(seed=shuffle_seed)
    return dataset.select(range(num_samples))


def train_and_report(
    trainer: GMATrainer,
    checkpoint: str | None,
    test_dataset: Dataset | None,
    finish_metrics: Callable[[dict[str, float], str], dict[str, float]],
    record: Callable[[dict[str, float]], TrainingRecord],
) -> dict[str, float]:
    """Train, save the model, evaluate it on validation and test data, and write the model card and `results.json`.

    Args:
        trainer: with everything set up.
        checkpoint: where to resume, or None.
        test_dataset: evaluated at the end, if there is one.
        finish_metrics: adds to the metrics of a split (`eval` or `test`) what the trainer cannot know.
        record: makes the record of the run from all metrics.

    Returns:
        All metrics.
    """
    args = trainer.args
    trained = trainer.train(resume_from_checkpoint=checkpoint)
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
        logger.info("Model, README.md and results.json are in %s.", args.output_dir)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return metrics


def _delete_checkpoints(output_dir: str) -> None:
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (folder / "trainer_state.json").is_file():
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
