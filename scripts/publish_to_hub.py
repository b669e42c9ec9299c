#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Publish a trained model on the Hugging Face Hub: weights, tokenizer, remote code, model card, recipe, results.

    python scripts/publish_to_hub.py outputs/wikipedia --repo_id user/gma-wikipedia --card model_cards/gma-gated-wikipedia-36m
    python scripts/publish_to_hub.py outputs/wikipedia --repo_id user/gma-wikipedia --upload

MODEL is a folder that a training script or save_pretrained wrote; it is only read. Without --upload nothing leaves this
machine: the folder is assembled and checked, and the script says what would happen. `--help` lists the options.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from gma_hf.training.publishing import Assembly, assemble, check_loading, check_repo_id, publish, read_card
from gma_hf.training.workflow import run_script


@dataclass
class PublishingArguments:
    """What is published, and where."""

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


def describe(assembly: Assembly) -> str:
    """The files with their sizes, and what stays behind."""
    width = max(map(len, assembly.files))
    lines = [f"  {name:<{width}}  {size:>15,} bytes" for name, size in assembly.files.items()]
    lines.append(f"{len(assembly.files)} files, {assembly.num_bytes / 1e6:,.1f} MB")
    lines += [f"stays behind: {name} ({reason})" for name, reason in assembly.left_behind.items()]
    return "\n".join(lines)


def main():
    parser = HfArgumentParser([PublishingArguments], description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="Folder of the trained model.")
    args, positional = parser.parse_args_into_dataclasses(look_for_args_file=False)
    check_repo_id(args.repo_id)
    with tempfile.TemporaryDirectory() as work:
        metadata = {name: getattr(args, name) for name in ("license", "language") if getattr(args, name)}
        folder = args.output or Path(work) / "model"
        assembly = assemble(positional.model, folder, args.card, args.max_total_gb, metadata)
        print(describe(assembly))
        print(f"model: {check_loading(positional.model, assembly.folder)}")
        data = read_card(assembly.folder / "README.md").data
        print(f"card: {data.pipeline_tag}, licence {data.license}, {len(data.eval_results or [])} results")
        if args.upload:
            print(f"published: {publish(assembly, args.repo_id, args.private, args.revision)}")
            return
        visibility = "private" if args.private else "public"
        branch = f", branch {args.revision}" if args.revision else ""
        print(
            f"Dry run: --upload would create the {visibility} model repository {args.repo_id} if it is missing, and upload "
            f"these {len(assembly.files)} files{branch}. The hub itself validates the card then."
        )


if __name__ == "__main__":
    run_script(main)
