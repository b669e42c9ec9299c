# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Publish a trained model on the Hugging Face Hub: weights, tokenizer, remote code, model card, recipe, results.

    gma-hf publish outputs/wikipedia --repo_id user/gma-wikipedia --card model_cards/gma-gated-wikipedia-36m
    gma-hf publish outputs/wikipedia --repo_id user/gma-wikipedia --upload

MODEL is a folder that a training command or save_pretrained wrote. The command only reads it. Without --upload, nothing leaves this
machine: the command assembles and checks the folder, and says what it would upload. `--help` lists the options.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ..training.arguments import parse_arguments
from ..training.errors import TrainingInputError
from ..training.options import check_options
from .publishing.assembly import Assembly, assemble, keep
from .publishing.hub import check_repo_id, publish, read_card
from .publishing.loading import check_loading
from .running import expect_one_process


@dataclass
class PublishingArguments:
    """What to publish, and where."""

    repo_id: str = field(metadata={"help": "Name on the hub, user/name.", "required": True})
    card: str | None = field(
        default=None,
        metadata={"help": "Folder with README.md, recipe.yaml and results.json, in place of the model's own."},
    )
    license: str | None = field(default=None, metadata={"help": "Licence to write into the card, such as apache-2.0."})
    language: str | None = field(default=None, metadata={"help": "Language to write into the card, such as en."})
    output: str | None = field(
        default=None, metadata={"help": "Keep the assembled folder here. Default: a temporary one."}
    )
    upload: bool = field(default=False, metadata={"help": "Upload. Without it, nothing leaves this machine."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to upload to, made if it is missing. Default: the main one."}
    )
    max_total_gb: float = field(default=100.0, metadata={"help": "Refuse to publish more than this."})

    def __post_init__(self):
        check_options(self)


def describe(assembly: Assembly) -> str:
    """The files with their sizes, and the files that are not published."""
    width = max(map(len, assembly.files))
    lines = [f"  {name:<{width}}  {size:>15,} bytes" for name, size in assembly.files.items()]
    lines.append(f"{len(assembly.files)} files, {assembly.num_bytes / 1e6:,.1f} MB")
    lines += [f"stays behind: {name} ({reason})" for name, reason in assembly.left_behind.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args, positional = parse_arguments(
        [PublishingArguments],
        argv,
        command="gma-hf publish",
        description=__doc__.splitlines()[0],
        positional=("model", "Folder of the trained model."),
    )
    expect_one_process()
    check_repo_id(args.repo_id)
    with tempfile.TemporaryDirectory(dir=beside(args.output)) as work:
        metadata = {name: getattr(args, name) for name in ("license", "language") if getattr(args, name)}
        assembly = assemble(positional.model, Path(work) / "model", args.card, args.max_total_gb, metadata)
        print(describe(assembly))
        print(f"model: {check_loading(positional.model, assembly.folder)}")
        if args.output is not None:
            assembly = keep(assembly, args.output)
        data = read_card(assembly.folder / "README.md").data
        print(f"card: {data.pipeline_tag}, licence {data.license}, {len(data.eval_results or [])} results")
        if args.upload:
            print(f"published: {publish(assembly, args.repo_id, args.private, args.revision)}")
            return
        visibility = "private" if args.private else "public"
        branch = f", branch {args.revision}" if args.revision else ""
        print(
            f"Dry run: --upload would create the {visibility} model repository {args.repo_id} if it is missing, and upload "
            f"these {len(assembly.files)} files{branch}. The Hub then validates the card."
        )


def beside(output: str | None) -> Path | None:
    """The folder for temporary files: the parent of the output folder, so that large files need not be copied."""
    if output is None:
        return None
    parent = Path(output).expanduser().resolve().parent
    if Path(output).is_file() or not parent.is_dir():
        problem = "is a file" if Path(output).is_file() else f"lies in {parent}, which does not exist"
        raise TrainingInputError(f"--output {output} {problem}. Give a folder to fill.")
    return parent
