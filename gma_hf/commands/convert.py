# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Replace the softmax attention of a pretrained model by Gaussian Mixture Attention, with mixtures fitted to a text.

    gma-hf convert MODEL --train_file corpus.txt --window_size 64 --output_dir converted
    gma-hf convert scripts/configs/convert_attention.yaml MODEL --train_file corpus.txt \
        --output_dir converted

Pass arguments on the command line, or in a JSON or YAML file before them. `--help` and `--help-all` list the arguments. The
output folder gets the model, its tokenizer, `results.json` and a model card. `gma-hf distill` recovers the quality.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments

from ..training.arguments import LanguageModelingArguments
from ..training.cards.conversion_card import write_conversion_card
from ..training.files import write_json
from ..training.options import check_options
from ..training.run_folder import RunFolder
from .running import expect_one_process
from .shared.conversion import (
    AUTO_CLASSES,
    ConversionArguments,
    SourceArguments,
    check_output,
    convert_and_calibrate,
    load_source,
    parse_model_arguments,
    prepare_data,
    results_of,
    run_of,
)
from .shared.training import check_length, set_up_logging


@dataclass
class OutputArguments:
    """The output folder."""

    output_dir: str = field(metadata={"help": "Folder of the converted model."})
    seed: int = field(default=0, metadata={"help": "Seed of the data's order, the samples and the mixtures."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where the model runs."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})

    def __post_init__(self):
        check_options(self)


def main(argv: list[str] | None = None) -> None:
    types = [SourceArguments, ConversionArguments, LanguageModelingArguments, OutputArguments]
    source, conversion, data_args, output = parse_model_arguments(
        "convert", types, argv, __doc__, ("use_forgetting", "seed", "device")
    )
    set_up_logging()
    expect_one_process()
    transformers.set_seed(output.seed)
    check_output(source, output.output_dir)
    run = RunFolder(output.output_dir, run_of("convert", (source, conversion, data_args, output), source, data_args))
    if run.is_finished:
        return
    with run:
        model, tokenizer = load_source(source)
        check_length(model, data_args.block_size, "--block_size")
        data = prepare_data(data_args, source, tokenizer, output.seed)
        model.to(output.device)
        report = convert_and_calibrate(model, data, conversion, output.seed, progress=not output.disable_tqdm)

        folder = run.beside("converted")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        args = TrainingArguments(output_dir=str(folder), use_cpu=output.device == "cpu")
        results = results_of(source, data_args, report, args)
        write_json(folder / "results.json", results)
        name = Path(output.output_dir).resolve().name
        write_conversion_card(folder, model, source.task, AUTO_CLASSES[source.task], results, name)
        run.put_in_place(folder)
    logging.getLogger("gma_hf").info("Model, README.md and results.json are in %s.", output.output_dir)
