# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Load the trained language model of the repository, let it write, load it again in a fresh process, and write the report on where
its tokens are routed.

    gma-hf demo            # `make demo` in a clone of the repository
    gma-hf demo --train    # trains a small model on source code first, some minutes on two cores; `make demo-train`

The weights are in clones of the repository only. Without them, `gma-hf demo` trains.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from ..analysis import analyze, write_report
from ..training.errors import TrainingInputError
from .shared.demo_training import train_small_model


REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAINED = REPOSITORY / "pretrained" / "gma-wikipedia-7m"
MARK = "demo.txt"  # marks a folder that the demo wrote and may overwrite
PROSE = ("The history of the village", "In 1912, the")
CODE = ("def read_lines(path):\n",)
MAX_STEPS = 280
REPORT_TOKENS = 2048
EXPECTED = "expected_logits.pt"

RELOAD = """
import sys, torch, gma_hf
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits
assert torch.equal(logits, expected), "the logits differ"
print(f"{type(model).__name__} from a fresh process: logits identical, {tuple(logits.shape)}")
"""


def say(text: str):
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def source_name(folder: Path) -> Path:
    """A folder as the user names it: relative to the current folder if it lies inside."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def load(arguments: argparse.Namespace):
    """
    The model that the demo shows, from the repository or newly trained.

    Returns:
        `tuple`: the folder of the model, the model, its tokenizer, prompts, a text for the report, and the name of the text.
    """
    if not arguments.train and PRETRAINED.is_dir():
        say("1. A trained GMA language model from the repository")
        # Many processors multiply in bfloat16, the type of the file, far slower than in float32
        model = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
        print(f"{source_name(PRETRAINED)}: {model.num_parameters():,} parameters, trained on Wikipedia")
        readme = REPOSITORY / "README.md"
        return PRETRAINED, model, tokenizer, PROSE, readme.read_text(encoding="utf-8"), readme.name
    say("1. A gated GMA language model, trained with the Trainer on the source files of Python's standard library")
    if not arguments.train:
        print("The trained model is in clones of the repository only, so the demo trains a small one: some minutes.")
    model, tokenizer, text = train_small_model(arguments.output_dir, arguments.max_steps or MAX_STEPS)
    return arguments.output_dir, model.eval(), tokenizer, CODE, text, "held-out source files"


def reload_in_fresh_process(source: Path, model, tokenizer, prompt: str, expected: Path) -> subprocess.Popen:
    """Start a process that loads the folder and compares its logits with those of the model."""
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt").to(model.device)).logits.cpu()
    torch.save((prompt, logits), expected)
    command = [sys.executable, "-c", RELOAD, str(source), str(expected)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def report_routes(model, tokenizer, text: str, text_name: str, folder: Path):
    """Write the report, and print what the components of one head prefer."""
    report = analyze(model, tokenizer, text, max_tokens=REPORT_TOKENS, text_name=text_name)
    layer, head = report.best_aligned()
    usage = layer.keys.statistics.usage[head]
    print(f"The head whose components tell kinds of tokens apart best: layer {layer.label}, head {head}.")
    for component in usage.argsort(descending=True)[:5].tolist():
        preferred = "  ".join(token for token, _, _ in report.top_tokens(layer, head, component, count=8))
        print(f"  component {component:>2} ({usage[component]:.0%} of all writes) prefers  {preferred}")
    page, _ = write_report(report, folder)
    print(f"{page}: all heads, for a browser")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gma-hf demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="train a small model instead of loading the trained one")
    parser.add_argument("--max_steps", type=int, help=f"steps of the training (default: {MAX_STEPS})")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/demo, and outputs/demo_train with --train")
    arguments = parser.parse_args(argv)
    trains = arguments.train or not PRETRAINED.is_dir()
    if arguments.max_steps is not None and not trains:
        raise TrainingInputError("--max_steps is for the training of the demo. Add --train, or leave --max_steps out.")
    if arguments.max_steps is not None and arguments.max_steps < 1:
        raise TrainingInputError(f"--max_steps must be at least 1, got {arguments.max_steps}.")
    folder = arguments.output_dir = arguments.output_dir or Path("outputs", "demo_train" if trains else "demo")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).is_file())):
        raise TrainingInputError(f"{folder} holds something that the demo did not write. Choose another --output_dir.")
    start = time.time()
    set_seed(0)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    source, model, tokenizer, prompts, text, text_name = load(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("The demo of gma_hf writes this folder anew each time.\n", encoding="utf-8")
    reloading = reload_in_fresh_process(source, model, tokenizer, prompts[0], folder / EXPECTED)

    say("2. It writes")
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "repetition_penalty": 1.2}
        written = model.generate(**inputs, max_new_tokens=60, **options)
        print(f"{tokenizer.decode(written[0], skip_special_tokens=True)} ...\n")

    say("3. Where its tokens are routed")
    report_routes(model, tokenizer, text, text_name, folder)

    say("4. Loaded through AutoModelForCausalLM in a fresh process")
    output, errors = reloading.communicate()
    if reloading.returncode != 0:
        raise RuntimeError(f"The model does not load in a fresh process:\n{errors}")
    print(output.strip())
    say(f"Done in {time.time() - start:.0f} seconds. The model is in {source_name(source)}.")
