# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The command `gma-hf`: find the verb, and call its function in `gma_hf.commands`.

This file is outside of the package, so that `gma-hf --help` answers at once: files of the package load PyTorch first.
"""

import difflib
import importlib
import sys


VERBS = {
    "train-clm": ("train_clm", "train a causal language model"),
    "train-mlm": ("train_mlm", "train a masked language model"),
    "train-classification": ("train_classification", "train or fine-tune a text classifier"),
    "convert": ("convert", "replace the softmax of a pretrained model by Gaussian mixtures"),
    "distill": ("distill", "convert a pretrained model and distil it to recover its quality"),
    "analyze": ("analyze", "show where the mixtures of a model route tokens, as a page"),
    "card": ("card", "measure a language model with confidence intervals, and write its model card"),
    "publish": ("publish", "check a trained model and upload it to the Hub"),
    "demo": ("demo", "let a trained model write, and report where its tokens are routed"),
}


def main(argv: list[str] | None = None) -> None:
    """
    Run `gma-hf VERB ...`.

    Args:
        argv (`list[str]`, *optional*): the arguments after the name of the program; by default `sys.argv[1:]`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    verb, *arguments = argv
    if verb == "--version":
        from gma_hf import __version__

        print(f"gma_hf {__version__}")
        return
    if verb not in VERBS:
        close = difflib.get_close_matches(verb.replace("_", "-"), VERBS, n=1)
        sys.exit(
            f"error: there is no verb {verb!r}." + (f" Did you mean {close[0]}?" if close else f"\n\n{overview()}")
        )
    run_verb(verb, arguments)


def run_verb(verb: str, argv: list[str]) -> None:
    """Run one verb with its arguments."""
    try:
        running = importlib.import_module("gma_hf.commands.running")
        command = importlib.import_module(f"gma_hf.commands.{VERBS[verb][0]}")
    except KeyboardInterrupt:
        sys.exit(130)
    running.run(lambda: command.main(argv))


def overview() -> str:
    """The verbs, one per line."""
    lines = ["usage: gma-hf VERB [arguments]", "", "Gaussian Mixture Attention for Hugging Face Transformers.", ""]
    lines += [f"  {verb:<22}{summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join([*lines, "", "gma-hf VERB --help explains a verb; --version prints the version."])


if __name__ == "__main__":
    main()
