# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Convert a pretrained model to Gaussian Mixture Attention and distil it to recover its quality.

    gma-hf distill scripts/configs/distill.yaml MODEL --train_file corpus.txt --output_dir distilled
    accelerate launch scripts/distill.py scripts/configs/distill.yaml MODEL --train_file corpus.txt --output_dir distilled

The steps are conversion, calibration, attention transfer, distillation, and optional fine-tuning. Each step ends with an
evaluation, and the command generates texts before and after. To continue an interrupted run, give the same command. Pass
arguments on the command line, or in a JSON or YAML file before them. `--help` lists the arguments.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from ..conversion.calibration.teacher import as_teacher
from ..conversion.distillation.arguments import GMADistillationArguments
from ..conversion.distillation.stages import distill
from ..conversion.distillation.trainer import GMADistillationTrainer
from ..training.arguments import LanguageModelingArguments
from ..training.cards.conversion_card import evaluation_table, write_conversion_card
from ..training.errors import TrainingInputError
from ..training.files import write_json
from ..training.options import check_options
from ..training.run_folder import RunFolder
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
    sample_texts,
    stage_arguments,
)
from .shared.training import check_length, set_up_logging


# Options that `--help` shows in addition to the options of every conversion
COMMON = (
    "transfer_steps",
    "transfer_learning_rate",
    "distillation_steps",
    "learning_rate",
    "gma_learning_rate",
    "finetune_steps",
    "per_device_train_batch_size",
    "bf16",
)

ORIGINAL, INITIALISED = "original, softmax", "after initialisation"
STATES = {
    "attention_transfer": "after attention transfer",
    "distillation": "after distillation",
    "finetune": "after fine-tuning",
}


@dataclass
class RecipeArguments:
    """
    Steps and learning rates of each stage. 0 steps skip a stage. `--learning_rate` is the learning rate of the distillation.
    """

    transfer_steps: int = field(default=500, metadata={"help": "Steps of attention transfer."})
    transfer_learning_rate: float = field(default=5e-3, metadata={"help": "Its learning rate."})
    distillation_steps: int = field(default=1500, metadata={"help": "Steps of distillation."})
    finetune_steps: int = field(default=0, metadata={"help": "Steps of fine-tuning on the text itself."})
    finetune_learning_rate: float = field(default=1e-4, metadata={"help": "Its learning rate."})
    lora_rank: int = field(
        default=0, metadata={"help": "Fine-tune adapters of this rank (needs peft); 0: all weights."}
    )
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "Modules that get adapters, see peft.LoraConfig."}
    )
    prompts: list[str] = field(
        default_factory=lambda: ["The history of the city begins", "Scientists have discovered that"],
        metadata={"help": "Beginnings of the texts to generate before and after."},
    )
    sample_tokens: int = field(default=60, metadata={"help": "Tokens to generate for each; 0 for no samples."})

    def __post_init__(self):
        check_options(self)


def stages_of(args: GMADistillationArguments, recipe: RecipeArguments) -> list[GMADistillationArguments]:
    stages = []
    if recipe.transfer_steps > 0:
        stages.append(
            stage_arguments(
                args,
                "attention_transfer",
                recipe.transfer_steps,
                recipe.transfer_learning_rate,
                gma_learning_rate=None,
            )
        )
    if recipe.distillation_steps > 0:
        stages.append(stage_arguments(args, "distillation", recipe.distillation_steps, args.learning_rate))
    if recipe.finetune_steps > 0:
        stages.append(
            stage_arguments(
                args, "finetune", recipe.finetune_steps, recipe.finetune_learning_rate, gma_learning_rate=None
            )
        )
    if not stages:
        raise TrainingInputError("There is nothing to do: every stage has 0 steps.")
    return stages


def adapters(recipe: RecipeArguments):
    if recipe.lora_rank == 0:
        return None
    from peft import LoraConfig

    targets = recipe.lora_target_modules
    return LoraConfig(
        r=recipe.lora_rank,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        modules_to_save=["mixture_norm"],
    )


def main(argv: list[str] | None = None) -> None:
    types = [
        SourceArguments,
        ConversionArguments,
        RecipeArguments,
        LanguageModelingArguments,
        GMADistillationArguments,
    ]
    source, conversion, recipe, data_args, args = parse_model_arguments("distill", types, argv, __doc__, COMMON)
    set_up_logging(args.process_index == 0)
    transformers.set_seed(args.seed)
    check_output(source, args.output_dir)
    stages = stages_of(args, recipe)
    description = run_of("distill", (source, conversion, recipe, data_args, args), source, data_args)
    description["options"]["num_processes"] = args.world_size
    run = RunFolder(args.output_dir, description, is_main=args.process_index == 0)
    if run.is_finished:
        return
    with run:
        try:
            convert_and_distil(source, conversion, recipe, data_args, args, stages, run)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"The same command goes on from what is in {args.output_dir}.") from error


def convert_and_distil(
    source: SourceArguments,
    conversion: ConversionArguments,
    recipe: RecipeArguments,
    data_args: LanguageModelingArguments,
    args: GMADistillationArguments,
    stages: list[GMADistillationArguments],
    run: RunFolder,
) -> None:
    """Convert the model, or load the converted model of an earlier start; train every stage, evaluate, and report."""
    folder = Path(args.output_dir)
    initial = folder / "0-initialised"
    teacher, tokenizer = load_source(source)
    check_length(teacher, data_args.block_size, "--block_size")
    with args.main_process_first(desc="tokenizing the data"):
        data = prepare_data(data_args, source, tokenizer, args.seed)

    run.begin()
    with args.main_process_first(desc="converting the model"):
        if not (initial / "results.json").is_file():
            model, _ = load_source(source)
            model.to(args.device)
            report = convert_and_calibrate(model, data, conversion, args.seed, progress=not args.disable_tqdm)
            model.save_pretrained(initial)
            tokenizer.save_pretrained(initial)
            # Last, so that an interrupted conversion starts again
            write_json(initial / "results.json", report)
    report = json.loads((initial / "results.json").read_text("utf-8"))
    auto_class = getattr(transformers, AUTO_CLASSES[source.task])
    model = auto_class.from_pretrained(initial, dtype=source.dtype)
    tokenizer = AutoTokenizer.from_pretrained(initial)

    evaluations, samples = {}, {}
    prompts = recipe.prompts if source.task == "text-generation" and recipe.sample_tokens > 0 else []
    evaluator = GMADistillationTrainer(
        model,
        stage_arguments(args, "distillation", 1, args.learning_rate),
        teacher=teacher,
        eval_dataset=data.validation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    evaluations[INITIALISED] = evaluator.evaluate()
    with as_teacher(model):
        evaluations = {ORIGINAL: evaluator.evaluate(), **evaluations}
    if prompts:
        samples[ORIGINAL] = sample_texts(teacher, tokenizer, prompts, recipe.sample_tokens)
        samples[INITIALISED] = sample_texts(model, tokenizer, prompts, recipe.sample_tokens)

    finished = distill(
        model,
        stages,
        folder,
        teacher=teacher,
        peft_config=adapters(recipe),
        # Fine-tuning has no teacher; its result is evaluated below
        stage_options={"finetune": {"eval_dataset": None}},
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    for result in finished:
        evaluations[STATES[result.stage]] = result.metrics
    if finished[-1].stage == "finetune":
        evaluations[STATES["finetune"]] = evaluator.evaluate()
    if data.test is not None:
        evaluations["at the end, test data"] = evaluator.evaluate(data.test)

    if evaluator.is_world_process_zero():
        if prompts:
            samples[STATES[finished[-1].stage]] = sample_texts(model, tokenizer, prompts, recipe.sample_tokens)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        common = results_of(source, data_args, report, args)
        results = {
            **common,
            "stages": [
                {"stage": result.stage, "steps": result.steps, "seconds": result.seconds} for result in finished
            ],
            "evaluations": evaluations,
            "samples": samples,
            "data": {**common["data"], "block_size": data_args.block_size},
            "num_processes": args.world_size,
        }
        write_json(folder / "results.json", results)
        write_conversion_card(folder, model, source.task, AUTO_CLASSES[source.task], results)
        run.finish()
        print(evaluation_table(evaluations))
