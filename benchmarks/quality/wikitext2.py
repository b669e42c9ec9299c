#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
GMA against softmax attention as language models on WikiText-2: equal parameters, tokens, tokenizer and schedule.

    python benchmarks/quality/wikitext2.py --data_dir wikitext-2

The folder holds `train.txt`, `valid.txt` and `test.txt` (or the same with `.gz` or `.xz`). Every row is one call of
`scripts/train_clm.py`; the width of the MLP is what makes the models equally large. About 12 minutes on an H100.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
import transformers

from benchmarks.lib.command import command
from benchmarks.lib.results import ROOT, Results
from benchmarks.lib.tables import markdown, mean_and_spread
from benchmarks.rivals.mixers import MIXERS, equal_width, number_of_parameters


SIZES = {
    "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_components": 64,
    "max_position_embeddings": 1024, "hidden_dropout": 0.2,
}  # fmt: skip
OURS = {MIXERS[name].title: name for name in ("softmax", "gma_paper", "gma_gated", "hybrid")}
SOFTMAX_INTERMEDIATE_SIZE = 1024
SCORES = ("test_perplexity", "test_word_perplexity", "eval_perplexity", "eval_word_perplexity")
TRAINING = {
    "block_size": 1024, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 100, "weight_decay": 0.1, "adam_beta2": 0.95, "eval_strategy": "epoch",
    "save_strategy": "no", "logging_steps": 20, "report_to": "none", "dataloader_drop_last": True,
}  # fmt: skip


def train(title: str, seed: int, options: argparse.Namespace, files: dict[str, str], work: Path) -> dict:
    mixer = MIXERS[OURS[title]]
    sizes = {**SIZES, "vocab_size": options.vocab_size}
    softmax = {**sizes, "intermediate_size": SOFTMAX_INTERMEDIATE_SIZE}
    width = equal_width(OURS[title], sizes, "softmax", softmax, multiples=(8,))
    overrides = {**SIZES, **mixer.overrides(SIZES["num_hidden_layers"]), "intermediate_size": width}
    output_dir, tokenizer = work / f"{OURS[title]}-{seed}", work / "tokenizer"
    words = {**{f"{split}_file": path for split, path in files.items()}, "output_dir": output_dir, **TRAINING}
    words |= {"preset": mixer.preset, "config_overrides": json.dumps(overrides), "seed": seed}
    words |= {"tokenizer_vocab_size": options.vocab_size, "num_train_epochs": options.epochs}
    if tokenizer.exists():  # all rows share the tokenizer that the first one trained
        words["tokenizer_name"] = tokenizer
    if torch.cuda.is_available():
        words |= {"bf16": True, "torch_compile": options.compile}
    line = [sys.executable, str(ROOT / "scripts" / "train_clm.py"), *(f"--{k}={v}" for k, v in words.items())]
    print(shlex.join(line), flush=True)
    subprocess.run(line, check=True)
    if not tokenizer.exists():
        transformers.AutoTokenizer.from_pretrained(output_dir).save_pretrained(tokenizer)
    metrics = json.loads((output_dir / "results.json").read_text())["metrics"]
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {
        "mixer": title, "seed": seed, "intermediate_size": width,
        "parameters": number_of_parameters(OURS[title], **{**sizes, "intermediate_size": width}),
        **{name: metrics[name] for name in SCORES},
        "train_seconds": metrics["train_runtime"],
        "validation_curve": [[x["step"], x["eval_perplexity"]] for x in history if "eval_perplexity" in x],
    }  # fmt: skip


def table(content: dict) -> str:
    rows = content["runs"] if "runs" in content else list(content["rows"].values())
    lines = []
    for title in dict.fromkeys(row["mixer"] for row in rows):
        own = [row for row in rows if row["mixer"] == title]
        scores = [mean_and_spread([row[name] for row in own], 1) for name in SCORES[:3]]
        lines.append([title, f"{own[0]['parameters'] / 1e6:.2f} M", *scores])
    columns = ["model", "parameters", "test perplexity", "test perplexity per word", "validation perplexity"]
    return markdown(columns, lines)


def run(options: argparse.Namespace) -> None:
    files = {}
    for split, stem in {"train": "train", "validation": "valid", "test": "test"}.items():
        folder = options.data_dir or Path()
        found = [path for end in ("", ".gz", ".xz") if (path := folder / f"{stem}.txt{end}").exists()]
        if not found:
            sys.exit(f"error: --data_dir {folder} holds no {stem}.txt (nor .txt.gz, .txt.xz)")
        files[split] = str(found[0])
    setting = {**SIZES, "vocab_size": options.vocab_size, "block_size": 1024, "epochs": options.epochs}
    results = Results(options.output, "wikitext2", setting)
    with tempfile.TemporaryDirectory() as work:
        for seed in options.seeds:
            for title in options.mixers:
                results.measure(f"{title}, seed {seed}", train, title, seed, options, files, Path(work))


def add_options(add) -> None:
    add("--data_dir", type=Path, help="folder with train, valid and test text")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--mixers", nargs="+", choices=list(OURS), default=list(OURS))
    add("--epochs", type=float, default=6)
    add("--vocab_size", type=int, default=8192)
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile on a GPU")


def main() -> None:
    command(__doc__, "wikitext2", add_options, run, table)


if __name__ == "__main__":
    main()
