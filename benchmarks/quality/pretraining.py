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
import math
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.kernels.training_gpu import NO_MASK, head_loss
from benchmarks.lib.results import circumstances, device
from benchmarks.lib.training import compile_blocks
from benchmarks.quality.language_modeling import evaluate
from benchmarks.quality.language_modeling_data import load, tokenizer_folder, windows
from gma_hf import GMAConfig, GMAForCausalLM


WARMUP_STEPS = 200
FLOOR = 0.05  # of the learning rate, at the end
LOGGED = 40  # points of the loss


def batches(tokens: Tensor, context: int, rows: int, seed: int):
    """Endless batches `[rows, context + 1]` of the text, every epoch cut at another place and in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(context, (), generator=generator))
        blocks, _ = windows(tokens[start:], context)
        for chosen in torch.randperm(len(blocks), generator=generator).split(rows):
            if len(chosen) == rows:
                yield blocks[chosen.to(blocks.device)].long()


def train(model: GMAForCausalLM, tokens: Tensor, options: argparse.Namespace) -> dict:
    """Train in place; what it was."""
    on_gpu = torch.cuda.is_available()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    names = {id(p): name for name, p in model.named_parameters()}
    # As the Trainer does: neither biases nor norms, to which the mixture counts
    undecayed = [p for p in model.parameters() if p.dim() < 2 or "norm" in names[id(p)] or "bias" in names[id(p)]]
    excluded = {id(p) for p in undecayed}
    groups = [
        {"params": [p for p in decayed if id(p) not in excluded], "weight_decay": 0.1},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=on_gpu)
    loss_function = head_loss
    if options.compile:
        compile_blocks(model, dynamic=False)
        loss_function = torch.compile(head_loss, dynamic=False)
    rows = options.tokens_per_step // options.context
    start, step, losses, recent = time.monotonic(), 0, [], []
    for batch in batches(tokens, options.context, rows, options.seed):
        progress = (time.monotonic() - start) / (60 * options.minutes)
        if progress >= 1 or step == options.max_steps:
            break
        rate = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate * min(1.0, (step + 1) / WARMUP_STEPS)
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            hidden = model.model(batch[:, :-1], attention_mask=NO_MASK, use_cache=False).last_hidden_state
            loss = loss_function(hidden, model.lm_head.weight, batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append(loss.detach())
        if step % 50 == 0:  # also keeps the clock honest: the GPU is waited for
            losses.append([step, round(torch.stack(recent).mean().item(), 4)])
            recent = []
            print(f"step {step}, {100 * progress:.0f} %, loss {losses[-1][1]}", flush=True)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.monotonic() - start
    seen = step * options.tokens_per_step
    return {
        "steps": step,
        "tokens": seen,
        "epochs": round(seen / len(tokens), 2),
        "learning_rate": options.learning_rate,
        "tokens_per_step": options.tokens_per_step,
        "context": options.context,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(seen / seconds),
        "losses": losses[:: max(1, len(losses) // LOGGED)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, required=True, help="of language_modeling.py --prepare")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--preset", default="correlated", help="of GMAConfig.from_preset")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop earlier, for a trial")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--intermediate_size", type=int, default=640)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens_per_step", type=int, default=65_536)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    options = parser.parse_args()
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        parser.error(f"{options.output_dir} holds something. Choose a new folder.")
    prepared = load(options.prepared)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(options.prepared))
    config = GMAConfig.from_preset(
        options.preset,
        vocab_size=prepared["vocab_size"],
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_components=options.components,
        max_position_embeddings=options.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(options.seed)
    with torch.device(device()):
        model = GMAForCausalLM(config).train()
    training = train(model, prepared["tokens"]["train"], options)
    model.to(torch.bfloat16).save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    # What is kept is what is measured
    kept = GMAForCausalLM.from_pretrained(options.output_dir, dtype=torch.float32).to(device())
    measured = {"parameters": kept.num_parameters(), **training, **evaluate(kept, prepared, options.context)}
    (options.output_dir / "measured.json").write_text(json.dumps({**measured, **circumstances()}, indent=1) + "\n")
    print(json.dumps({name: value for name, value in measured.items() if name != "losses"}, indent=1))


if __name__ == "__main__":
    main()
