#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
One small language model, trained with the package for as many minutes as are given, and kept.

    python benchmarks/quality/language_modeling.py --data DATA --prepare lm8k.pt --vocab_size 8192
    python benchmarks/quality/pretraining.py --prepared lm8k.pt --minutes 30 --output_dir pretrained/wikipedia-small

It reads the text of `language_modeling.py` over and over, in an order of its own each time. The learning rate follows the clock: a
warm-up, then a cosine that ends with the last minute. The folder holds weights in bfloat16, tokenizer, and `measured.json`: perplexities
of these weights per token and per word with 95% intervals, and what the training was.
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer

from benchmarks.lib.results import circumstances, device
from benchmarks.lib.timed import TimedSchedule
from benchmarks.lib.training import train
from benchmarks.quality.language_modeling import evaluate, head_loss_trainer
from benchmarks.quality.tasks.language_modeling import load, tokenizer_folder, windows
from gma_hf import GMAConfig, GMAForCausalLM


WARMUP_STEPS, FLOOR = 200, 0.05


class Epochs(IterableDataset):
    """Endless batches `[rows, context + 1]` of the text, every epoch cut at another place and in another order."""

    def __init__(self, tokens: Tensor, context: int, rows: int, seed: int):
        self.tokens, self.context, self.rows, self.seed = tokens, context, rows, seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            start = int(torch.randint(self.context, (), generator=generator))
            blocks, _ = windows(self.tokens[start:], self.context)
            for chosen in torch.randperm(len(blocks), generator=generator).split(self.rows):
                if len(chosen) == self.rows:
                    yield {"input_ids": blocks[chosen].long()}


def pretrain(model: GMAForCausalLM, tokens: Tensor, options: argparse.Namespace) -> dict:
    """Train in place; what it was."""
    rows = options.tokens_per_step // options.context
    steps = options.max_steps if options.max_steps > 0 else 10**6
    recipe = {"steps": steps, "batch_size": 1, "learning_rate": options.learning_rate, "weight_decay": 0.1}
    row = train(
        model, Epochs(tokens, options.context, rows, options.seed), lambda batches: batches[0], recipe, options.seed,
        score=None, trainer_class=head_loss_trainer(model, options.compile), lr_scheduler_type="constant", adam_beta2=0.95,
        logging_steps=50, accelerator_config={"dispatch_batches": False},
        callbacks=[TimedSchedule(60 * options.minutes, FLOOR, WARMUP_STEPS)],
    )  # fmt: skip
    seen = row["steps"] * options.tokens_per_step
    names = ("learning_rate", "tokens_per_step", "context")
    return {
        "steps": row["steps"], "tokens": seen, "epochs": round(seen / len(tokens), 2),
        **{name: getattr(options, name) for name in names}, "train_seconds": row["train_seconds"],
        "tokens_per_second": round(seen / row["train_seconds"]),
        "losses": row["losses"][:: max(1, len(row["losses"]) // 40)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True, help="of language_modeling.py --prepare")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--preset", default="correlated", help="of GMAConfig.from_preset")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop earlier, for a trial")
    sizes = {"hidden_size": 256, "intermediate_size": 640, "layers": 6, "heads": 4, "components": 64, "context": 1024}
    for name, value in {**sizes, "tokens_per_step": 65_536, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    options = parser.parse_args()
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        parser.error(f"{options.output_dir} holds something. Choose a new folder.")
    prepared = load(options.prepared)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(options.prepared))
    config = GMAConfig.from_preset(
        options.preset, vocab_size=prepared["vocab_size"], hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size, num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_components=options.components, max_position_embeddings=options.context,
        mean_init="normal",  # as the model of this repository was trained, before the preset had orthogonal means
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )  # fmt: skip
    torch.manual_seed(options.seed)
    with torch.device(device()):
        model = GMAForCausalLM(config).train()
    training = pretrain(model, prepared["tokens"]["train"], options)
    model.config.use_cache = True  # which the training had switched off
    model.to(torch.bfloat16).save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    # What is kept is what is measured
    kept = GMAForCausalLM.from_pretrained(options.output_dir, dtype=torch.float32).to(device())
    measured = {"parameters": kept.num_parameters(), **training, **evaluate(kept, prepared, options.context)}
    (options.output_dir / "measured.json").write_text(json.dumps({**measured, **circumstances()}, indent=1) + "\n")
    print(json.dumps({name: value for name, value in measured.items() if name != "losses"}, indent=1))


if __name__ == "__main__":
    main()
