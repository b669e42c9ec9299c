#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Language modelling: the mixers of `rivals/mixers.py` with equal parameters, data, tokenizer and schedule, beside each other.

    python benchmarks/quality/language_modeling.py --data DATA --prepare lm.pt
    python benchmarks/quality/language_modeling.py --prepared lm.pt --mixers softmax gma_gated mamba2 --seeds 0 1 --rates 1e-3 2e-3 4e-3
    python benchmarks/quality/language_modeling.py --prepared lm.pt --rows gma_gated:1024:128 gma_gated:4096
    python benchmarks/quality/language_modeling.py --table --plot

DATA holds `wikipedia-long` and `wikitext-103`. Trained on 41 million words of Wikipedia, not on the training set of
WikiText-103, and tested on the real validation and test sets of WikiText-103, in the published tokenised form, which the
models have never seen, and with that undone (see `tasks/language_modeling.py`). So no number here compares with those of models
trained on WikiText-103.

8 layers of width 512 with 8 heads (Mamba-2: 16 layers without MLP, 36 million parameters; the MLPs of the others are as wide
as makes them equally large). A step is 65,536 tokens, and no token is seen twice. Perplexity per word counts the published
tokens, a word or the end of a line; windows are as long as in training and do not overlap. Perplexity is also split as in Zoology:
tokens that complete a pair of tokens which the window has shown before, and all others. A row is
mixer:context[:components[:seed[:rate]]]; rows that the output file holds are not trained again, and of several rates the tables
show the best of each mixer. With `--steps` fewer tokens are seen.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from benchmarks.kernels.training_gpu import NO_MASK, head_loss
from benchmarks.lib.command import command
from benchmarks.lib.results import Results, device
from benchmarks.lib.runner import Row, add_run_options, run_rows
from benchmarks.lib.training import compile_blocks, evaluating, train
from benchmarks.quality.language_modeling_report import plot, table
from benchmarks.quality.tasks import language_modeling as data
from benchmarks.quality.tasks.language_modeling import windows
from benchmarks.rivals import mixers
from benchmarks.rivals.mixers import COMPARED, MIXERS, make_config, make_model
from gma_hf.training.intervals import bootstrap_perplexity


REFERENCE = "mamba2"  # whose size the others take
COMPONENTS, RATE = 64, 1e-3
CURVE_TOKENS = 131_072  # of the validation text
LOGIT_TOKENS = 8192  # whose logits are in memory at a time
BUCKETS = 16  # of positions, in the extrapolation
SETTING = ("hidden_size", "layers", "heads", "steps", "tokens_per_step")  # of all rows
EXTRAPOLATION = 4  # times the length of training


LANGUAGE_MIXERS = [name for name in COMPARED if MIXERS[name].only != "bidirectional"]


class Blocks(Dataset):
    """Blocks of a stream of tokens, each with the token after it."""

    def __init__(self, tokens: Tensor, context: int):
        self.blocks, _ = windows(tokens, context)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.blocks[indices].long()


class HeadLossTrainer(Trainer):
    """The stock Trainer with head and loss as one function, which torch.compile fuses; there is no padding to look for."""

    head_loss = staticmethod(head_loss)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A mean over the tokens of a forward pass, to be averaged over those of a step
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: PreTrainedModel, inputs: dict, *args, **kwargs) -> Tensor:
        tokens = inputs["input_ids"]
        with torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
            hidden_states = model.model(tokens[:, :-1], attention_mask=NO_MASK, use_cache=False).last_hidden_state
            return self.head_loss(hidden_states, model.lm_head.weight, tokens[:, 1:])


def head_loss_trainer(model: PreTrainedModel, compile: bool) -> type[HeadLossTrainer]:
    """The trainer; with `compile`, the blocks of the model and head and loss are compiled."""
    if not compile:
        return HeadLossTrainer
    compile_blocks(model, dynamic=False)
    compiled = {"head_loss": staticmethod(torch.compile(head_loss, dynamic=False))}
    return type("CompiledHeadLossTrainer", (HeadLossTrainer,), compiled)


@torch.no_grad()
def token_nll(
    model: PreTrainedModel, tokens: Tensor, context: int, batch_tokens: int = 65_536
) -> tuple[Tensor, Tensor]:
    """
    Negative log-likelihood of every token but the first, in windows of `context` predicted tokens that do not overlap: nats of the
    whole windows, `[windows, context]`, and of what is left, `[fewer than context]`, on the CPU.
    """
    whole, rest = windows(tokens, context)
    batches = list(whole.split(max(1, batch_tokens // context))) + ([rest[None]] if len(rest) > 1 else [])
    found = []
    with evaluating(model):
        for batch in batches:
            batch = batch.long().to(model.device)
            hidden_states = model.model(batch[:, :-1], attention_mask=NO_MASK, use_cache=False).last_hidden_state
            parts = (hidden_states.flatten(0, 1), batch[:, 1:].flatten())
            pairs = zip(*(part.split(LOGIT_TOKENS) for part in parts), strict=True)
            nll = [F.cross_entropy(model.lm_head(x).float(), labels, reduction="none") for x, labels in pairs]
            found.append(torch.cat(nll).view(len(batch), -1).cpu())
    last = found.pop().flatten() if len(rest) > 1 else torch.empty(0)
    return torch.cat(found) if found else torch.empty(0, context), last


def evaluate(model: PreTrainedModel, prepared: dict, context: int) -> dict:
    """Perplexities of the validation text and of WikiText-103, with 95% intervals."""
    row = {}
    for name, tokens in prepared["tokens"].items():
        if name == "train":
            continue
        whole, last = token_nll(model, tokens, context)
        sums, counts = whole.double().sum(dim=1).tolist(), [context] * len(whole)
        if len(last):
            sums, counts = [*sums, last.double().sum().item()], [*counts, len(last)]
        perplexity = math.exp(sum(sums) / sum(counts))
        row |= by_pair(name, whole, tokens, context)
        low, high = bootstrap_perplexity(sums, counts)
        row[f"{name}_perplexity"] = perplexity
        row[f"{name}_perplexity_interval"] = [low, high]
        if name.startswith("wikitext"):
            size = prepared["counts"][name.split("_")[1]]
            for kind, number in (("", size["words"] + size["lines"]), ("_without_line_ends", size["words"])):
                # The same likelihood, shared among the words
                exponent = sum(counts) / number
                row[f"{name}_word_perplexity{kind}"] = perplexity**exponent
                if not kind:
                    row[f"{name}_word_perplexity_interval"] = [low**exponent, high**exponent]
    return row


def repeated_pairs(window: Tensor) -> Tensor:
    """True at a predicted token, of `[windows, length + 1]` tokens, that followed the token before it already once in its window."""
    pairs = window[:, :-1].long() * 2**32 + window[:, 1:].long()
    ordered, order = pairs.sort(dim=1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter(1, order, again)


def by_pair(name: str, nll: Tensor, tokens: Tensor, context: int) -> dict:
    """Perplexity of tokens that complete a pair which the window has shown before, and of all others."""
    repeated = repeated_pairs(windows(tokens, context)[0])
    parts = {"repeated": nll[repeated], "other": nll[~repeated]}
    found = {f"{name}_{part}_perplexity": x.double().mean().exp().item() for part, x in parts.items() if len(x)}
    return {**found, f"{name}_repeated_share": round(repeated.float().mean().item(), 4) if len(nll) else None}


def extrapolate(model: PreTrainedModel, tokens: Tensor, context: int) -> dict:
    """Perplexity by position in windows four times as long as those of the training."""
    if model.config.position_embedding_type == "learned":
        return {"extrapolation": None, "extrapolation_note": f"its learned positions end at {context}"}
    length = EXTRAPOLATION * context
    whole, _ = token_nll(model, tokens, length)
    if len(whole) == 0:
        return {"extrapolation": None, "extrapolation_note": f"the text has fewer than {length} tokens"}
    by_position = whole.double().mean(dim=0).view(BUCKETS, -1).mean(dim=1).exp()
    return {"extrapolation": [round(x, 3) for x in by_position.tolist()], "extrapolation_bucket": length // BUCKETS}


def train_one(model: PreTrainedModel, prepared: dict, context: int, seed: int, rate: float, options) -> dict:
    """One training; what it cost and how it went."""
    micro_tokens = min(options.micro_tokens, options.tokens_per_step)
    rows = max(1, micro_tokens // context)
    accumulation = options.tokens_per_step // (rows * context)
    if accumulation * rows * context != options.tokens_per_step:
        sys.exit(f"error: {options.tokens_per_step} tokens per step are no multiple of {rows} x {context} tokens.")
    validation = prepared["tokens"]["wikipedia_valid"][: CURVE_TOKENS + 1]
    row = train(
        model,
        Blocks(prepared["tokens"]["train"], context),
        lambda blocks: {"input_ids": blocks},
        {"steps": options.steps, "batch_size": rows, "learning_rate": rate, "weight_decay": 0.1},
        seed,
        score=lambda: math.exp(token_nll(model, validation, context)[0].mean().item()),
        trainer_class=head_loss_trainer(model, options.compile),
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(100, max(1, options.steps // 8)),
        adam_beta2=0.95,
    )
    speed = round(1e3 * options.tokens_per_step / row["ms_per_step"])
    return {"learning_rate": rate, **row, "tokens_per_second": speed, "validation_curve": row.pop("curve")}


def measure(mixer: str, context: int, components: int, seed: int, rate: float, prepared: dict, options) -> dict:
    """Train and evaluate one row."""
    sizes = {
        "vocab_size": prepared["vocab_size"], "hidden_size": options.hidden_size, "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads, "max_position_embeddings": context, "num_components": components,
    }  # fmt: skip
    sizes["intermediate_size"] = mixers.equal_width(mixer, sizes, REFERENCE, sizes)
    config = make_config(mixer, **sizes)
    torch.manual_seed(seed)
    with torch.device(device()):
        model = make_model(mixer, config)
    row = {
        "mixer": mixer, "context": context, "components": components, "seed": seed, "parameters": model.num_parameters(),
        "intermediate_size": config.intermediate_size, "state_per_layer": mixers.state_per_layer(mixer, config),
        **mixers.program_of(mixer),
    }  # fmt: skip
    try:
        row |= train_one(model, prepared, context, seed, rate, options)
    except torch.cuda.OutOfMemoryError as error:
        return {**row, "refused": str(error).split("\n")[0]}
    if not math.isfinite(row["losses"][-1][1]):
        return {**row, "refused": "the training loss became NaN or infinite"}
    row |= evaluate(model, prepared, context)
    row |= extrapolate(model, prepared["tokens"]["wikitext_test_detokenized"], context)
    if options.save is not None and not MIXERS[mixer].is_rival:
        folder = options.save / f"{mixer}-{context}-{components}-{seed}"
        model.save_pretrained(folder)
        if data.tokenizer_folder(options.prepared).exists():
            AutoTokenizer.from_pretrained(data.tokenizer_folder(options.prepared)).save_pretrained(folder)
    return row


def wanted_rows(options: argparse.Namespace) -> dict[str, tuple]:
    """By name, the mixer, context, components, seed and rate of every row, seed by seed."""
    rows = [
        (mixer, context, components, seed, rate)
        for seed in options.seeds
        for context in options.contexts
        for components in options.components
        for mixer in options.mixers
        for rate in options.rates
    ]
    if options.rows:
        rows = []
        for text in options.rows:
            mixer, context, *rest = text.split(":")
            if mixer not in MIXERS or MIXERS[mixer].only == "bidirectional":
                sys.exit(f"error: there is no mixer {mixer!r} in {text!r}. Choose one of {LANGUAGE_MIXERS}.")
            rest = [*rest, *(COMPONENTS, 0, RATE)[len(rest) :]]
            rows.append((mixer, int(context), int(rest[0]), int(rest[1]), float(rest[2])))
    # The rate of the committed rows is not in their names
    return {":".join(map(str, row[:4])) + ("" if row[4] == RATE else f":{row[4]:g}"): row for row in rows}


def run(options: argparse.Namespace) -> None:
    """Measure the rows that the output file does not hold yet."""
    prepared = data.load(options.prepared)
    available = len(prepared["tokens"]["train"]) // options.tokens_per_step
    options.steps = min(options.steps or available, available)
    setting = {name: getattr(options, name) for name in SETTING}
    setting |= {"vocab_size": prepared["vocab_size"], "equal_parameters_with": REFERENCE}
    jobs = {name: Row(partial(measure, *row, prepared, options)) for name, row in wanted_rows(options).items()}
    run_rows(Results(options.output, "language_modeling", setting), jobs, options)


def add_options(add) -> None:
    add("--max_tokens", type=int, help="to train on, in the prepared file; default: all")
    add("--vocab_size", type=int, default=data.VOCAB_SIZE, help="of the tokenizer that --prepare trains")
    add("--rows", nargs="+", help="mixer:context[:components[:seed[:rate]]], instead of the next five")
    add("--mixers", nargs="+", choices=LANGUAGE_MIXERS, default=LANGUAGE_MIXERS)
    add("--contexts", type=int, nargs="+", default=[1024])
    add("--components", type=int, nargs="+", default=[COMPONENTS])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--rates", type=float, nargs="+", default=[RATE], help="learning rates of every mixer")
    add("--steps", type=int, help="default: one pass over the training text")
    add("--tokens_per_step", type=int, default=65_536)
    add("--micro_tokens", type=int, default=65_536, help="per forward pass, but at least a sequence")
    add("--hidden_size", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    compiled = {"action": argparse.BooleanOptionalAction, "default": torch.cuda.is_available()}
    add("--compile", **compiled, help="the blocks, and the head with the loss; default: on a GPU")
    add("--save", type=Path, help="folder for the trained models that the package can load")
    add_run_options(add)


def main() -> None:
    def prepare(options: argparse.Namespace) -> dict:
        return data.prepare(options.data, options.prepare, options.vocab_size, options.max_tokens)

    command(__doc__, "language_modeling", add_options, run, table, plot, needs=("prepared",), prepare=prepare)


if __name__ == "__main__":
    main()
