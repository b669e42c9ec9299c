#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
GMA against softmax attention as language models on WikiText-2: equal parameters, tokens, tokenizer and schedule.

    python benchmarks/quality/wikitext2.py --data_dir wikitext-2 --output benchmarks/results/wikitext2.json

The folder holds `train.txt`, `valid.txt` and `test.txt` (or the same with `.gz` or `.xz`). Every run is one call of
`scripts/train_clm.py`; the width of the MLP is what makes the models equally large. About 12 minutes on an H100. Runs that
the output file already holds are not repeated.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
import transformers

from gma_hf import GMAConfig, GMAForCausalLM, __version__


ROOT = Path(__file__).resolve().parents[2]
NUM_LAYERS = 8
# What the mixers share, and what each is: the preset and what differs from it
SHARED = {
    "hidden_size": 384,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_components": 64,
    "max_position_embeddings": 1024,
    "hidden_dropout": 0.2,
}
HYBRID = ["full_attention" if index % 4 == 3 else "linear_attention" for index in range(NUM_LAYERS)]
MIXERS = {
    "softmax + RoPE": ("gated", {"layer_types": ["full_attention"] * NUM_LAYERS}),
    "GMA, paper block": ("paper", {}),
    "GMA, gated block": ("gated", {}),
    "hybrid: 1 softmax layer in 4, others GMA gated": ("gated", {"layer_types": HYBRID}),
}
SOFTMAX_INTERMEDIATE_SIZE = 1024
SCORES = ("test_perplexity", "test_word_perplexity", "eval_perplexity", "eval_word_perplexity")


def number_of_parameters(preset: str, overrides: dict, intermediate_size: int, vocab_size: int) -> int:
    config = GMAConfig.from_preset(
        preset, **SHARED, **overrides, intermediate_size=intermediate_size, vocab_size=vocab_size
    )
    with torch.device("meta"):
        return GMAForCausalLM(config).num_parameters()


def equal_intermediate_size(mixer: str, vocab_size: int) -> int:
    """The MLP width, a multiple of 8, that brings a mixer nearest to the size of the softmax model."""
    target = number_of_parameters(*MIXERS["softmax + RoPE"], SOFTMAX_INTERMEDIATE_SIZE, vocab_size)
    smallest, next_smallest = (number_of_parameters(*MIXERS[mixer], size, vocab_size) for size in (8, 16))
    return 8 + 8 * round((target - smallest) / (next_smallest - smallest))


def train(mixer: str, seed: int, arguments: argparse.Namespace, files: dict[str, str], work: Path) -> dict:
    preset, overrides = MIXERS[mixer]
    vocab_size = arguments.vocab_size
    intermediate_size = equal_intermediate_size(mixer, vocab_size)
    output_dir = work / f"{list(MIXERS).index(mixer)}-{seed}"
    tokenizer = work / "tokenizer"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train_clm.py"),
        *(f"--{split}_file={path}" for split, path in files.items()),
        f"--output_dir={output_dir}",
        f"--preset={preset}",
        f"--config_overrides={json.dumps({**SHARED, **overrides, 'intermediate_size': intermediate_size})}",
        f"--tokenizer_vocab_size={vocab_size}",
        f"--seed={seed}",
        "--block_size=1024",
        f"--num_train_epochs={arguments.epochs}",
        "--per_device_train_batch_size=16",
        "--per_device_eval_batch_size=16",
        "--learning_rate=1e-3",
        "--lr_scheduler_type=cosine",
        "--warmup_steps=100",
        "--weight_decay=0.1",
        "--adam_beta2=0.95",
        "--eval_strategy=epoch",
        "--save_strategy=no",
        "--logging_steps=20",
        "--report_to=none",
        "--dataloader_drop_last=True",
    ]
    if tokenizer.exists():  # all runs share the tokenizer that the first one trained
        command.append(f"--tokenizer_name={tokenizer}")
    if torch.cuda.is_available():
        command += ["--bf16", f"--torch_compile={arguments.compile}"]
    print(f"\n=== {mixer}, seed {seed}\n{shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)
    if not tokenizer.exists():
        transformers.AutoTokenizer.from_pretrained(output_dir).save_pretrained(tokenizer)

    metrics = json.loads((output_dir / "results.json").read_text())["metrics"]
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {
        "mixer": mixer,
        "seed": seed,
        "parameters": number_of_parameters(preset, overrides, intermediate_size, vocab_size),
        "intermediate_size": intermediate_size,
        **{name: metrics[name] for name in SCORES},
        "train_seconds": metrics["train_runtime"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "versions": {
            "gma_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "validation_curve": [
            [entry["step"], entry["eval_perplexity"]] for entry in history if "eval_perplexity" in entry
        ],
    }


def table(runs: list[dict]) -> str:
    lines = [
        "| model | parameters | test perplexity | test perplexity per word | validation perplexity |",
        "|---|---:|---:|---:|---:|",
    ]
    for mixer in dict.fromkeys(run["mixer"] for run in runs):
        own = [run for run in runs if run["mixer"] == mixer]

        def mean(name: str, own: list[dict] = own) -> str:
            values = [run[name] for run in own]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{spread}"

        lines.append(
            f"| {mixer} | {own[0]['parameters'] / 1e6:.2f} M | {mean('test_perplexity')} | "
            f"{mean('test_word_perplexity')} | {mean('eval_perplexity')} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with train, valid and test text")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "wikitext2.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile on a GPU"
    )
    arguments = parser.parse_args()

    files = {}
    for split, stem in {"train": "train", "validation": "valid", "test": "test"}.items():
        found = [
            path for suffix in ("", ".gz", ".xz") if (path := arguments.data_dir / f"{stem}.txt{suffix}").exists()
        ]
        if not found:
            parser.error(f"{arguments.data_dir} holds no {stem}.txt (nor .txt.gz, .txt.xz)")
        files[split] = str(found[0])

    words = ["wikitext-2" if word == str(arguments.data_dir) else word for word in sys.argv[1:]]
    setting = {**SHARED, "vocab_size": arguments.vocab_size, "block_size": 1024, "epochs": arguments.epochs}
    report = {
        "benchmark": "wikitext2",
        "command": shlex.join(["python", "benchmarks/quality/wikitext2.py", *words]),
        "setting": setting,
        "runs": [],
    }
    if arguments.output.exists():
        earlier = json.loads(arguments.output.read_text())
        if earlier["setting"] != setting:
            parser.error(f"{arguments.output} holds runs of another setting; choose another --output")
        report["runs"] = earlier["runs"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    done = {(run["mixer"], run["seed"]) for run in report["runs"]}
    with tempfile.TemporaryDirectory() as work:
        for seed in arguments.seeds:
            for mixer in arguments.mixers:
                if (mixer, seed) in done:
                    continue
                report["runs"].append(train(mixer, seed, arguments, files, Path(work)))
                # After every run: a later call goes on where this one was stopped
                arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["runs"]))


if __name__ == "__main__":
    main()
