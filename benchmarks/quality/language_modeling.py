#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Language modelling: the mixers of `mixers.py` with equal parameters, data, tokenizer and schedule, beside each other.

    python benchmarks/quality/language_modeling.py --data DATA --prepare lm.pt
    python benchmarks/quality/language_modeling.py --prepared lm.pt --mixers softmax gma_gated mamba2 --contexts 1024 --seeds 0 1 2
    python benchmarks/quality/language_modeling.py --prepared lm.pt --rows gma_gated:1024:128 gma_gated:1024:256
    python benchmarks/quality/language_modeling.py --table --plot

DATA holds `wikipedia-long` and `wikitext-103`. Trained on 41 million words of Wikipedia, not on the training set of
WikiText-103, and tested on the real validation and test sets of WikiText-103, in the published tokenised form, which the
models have never seen, and with that undone (see `language_modeling_data.py`). So no number here compares with those of models
trained on WikiText-103.

8 layers of width 512 with 8 heads (Mamba-2: 16 layers without MLP, 36 million parameters; the MLPs of the others are as wide
as makes them equally large). A step is 65,536 tokens, and no token is seen twice. Perplexity per word counts the published
tokens, a word or the end of a line; windows are as long as in training and do not overlap. A row is
mixer:context[:components[:seed]]; rows that the output file holds are not trained again. With `--steps` fewer tokens are seen.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.conversion.common import ROOT, Results, device
from benchmarks.kernels.training_gpu import NO_MASK, head_loss
from benchmarks.lib.training import evaluating
from benchmarks.quality.language_modeling_data import VOCAB_SIZE, load, prepare, tokenizer_folder, windows
from benchmarks.quality.language_modeling_report import plot, table
from benchmarks.rivals.mixers import MIXERS, equal_intermediate_size, make_config, make_model
from gma_hf.training.intervals import bootstrap_perplexity


OUTPUT = ROOT / "benchmarks" / "results" / "language_modeling.json"
FIGURE = ROOT / "docs" / "figures" / "language_modeling.png"
REFERENCE = "mamba2"  # whose size the others take
COMPONENTS = 64
CURVE_POINTS = 8
CURVE_TOKENS = 131_072  # of the validation text
LOGIT_TOKENS = 8192  # whose logits are in memory at a time
BUCKETS = 16  # of positions, in the extrapolation
SETTING = ("hidden_size", "layers", "heads", "steps", "tokens_per_step", "redraw_interval")  # of all rows
EXTRAPOLATION = 4  # times the length of training


class Blocks(Dataset):
    """Blocks of a stream of tokens, each with the token after it."""

    def __init__(self, tokens: Tensor, context: int):
        self.blocks, _ = windows(tokens, context)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.blocks[indices].long()


class HeadLossTrainer(Trainer):
    """
    The stock Trainer; head and loss are one function, which torch.compile fuses, and nobody looks for padding or packed
    sequences, of which there are none.
    """

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


class Watch(TrainerCallback):
    """Validation perplexity at so many points of the training, and the speed between them."""

    def __init__(self, validation: Tensor, context: int, tokens_per_step: int):
        self.validation, self.context, self.tokens_per_step = validation[: CURVE_TOKENS + 1], context, tokens_per_step
        self.points: list[tuple[int, float]] = []
        self.speeds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.every = max(1, state.max_steps // CURVE_POINTS)
        self.resume(state)

    def resume(self, state) -> None:
        self.start, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        self.speeds.append(self.tokens_per_step * (state.global_step - self.first_step) / seconds)
        nll, _ = token_nll(model, self.validation, self.context)
        self.points.append((state.global_step, round(math.exp(nll.mean().item()), 3)))
        print(
            f"  step {state.global_step}: perplexity {self.points[-1][1]}, {self.speeds[-1]:,.0f} tokens/s", flush=True
        )
        self.resume(state)

    @property
    def tokens_per_second(self) -> float:
        """The median over the stretches between two points but the first, in which everything is compiled."""
        return statistics.median(self.speeds[1:] or self.speeds)


@torch.no_grad()
def token_nll(
    model: PreTrainedModel, tokens: Tensor, context: int, batch_tokens: int = 65_536
) -> tuple[Tensor, Tensor]:
    """
    Negative log-likelihood of every token but the first, in windows that do not overlap.

    Args:
        model: on its device.
        tokens: `[number]`.
        context: predicted tokens per window.
        batch_tokens: per forward pass.

    Returns:
        Nats of the whole windows, `[windows, context]`, and of what is left, `[fewer than context]`, on the CPU.
    """
    whole, rest = windows(tokens, context)
    batches = list(whole.split(max(1, batch_tokens // context))) + ([rest[None]] if len(rest) > 1 else [])
    found = []
    # Evaluation is too short for a compilation of its own to pay
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            batch = batch.long().to(model.device)
            hidden_states = model.model(batch[:, :-1], attention_mask=NO_MASK, use_cache=False).last_hidden_state
            pairs = zip(
                hidden_states.flatten(0, 1).split(LOGIT_TOKENS),
                batch[:, 1:].flatten().split(LOGIT_TOKENS),
                strict=True,
            )
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


def train(model: PreTrainedModel, prepared: dict, context: int, seed: int, learning_rate: float, options) -> dict:
    """One training; what it cost and how it went."""
    on_gpu = torch.cuda.is_available()
    micro_tokens = min(options.micro_tokens, options.tokens_per_step)
    rows = max(1, micro_tokens // context)
    accumulation = options.tokens_per_step // (rows * context)
    if accumulation * rows * context != options.tokens_per_step:
        raise SystemExit(
            f"error: {options.tokens_per_step} tokens per step are no multiple of {rows} x {context} tokens."
        )
    trainer_class = HeadLossTrainer
    if options.compile:
        torch._dynamo.reset()  # every row has shapes of its own: do not compile for shapes in general
        for module in (*model.model.layers, model.model.norm):
            module.compile(dynamic=False)
        trainer_class = type(
            "CompiledHeadLossTrainer",
            (HeadLossTrainer,),
            {"head_loss": staticmethod(torch.compile(head_loss, dynamic=False))},
        )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(prepared["tokens"]["wikipedia_valid"], context, options.tokens_per_step)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=min(100, max(1, options.steps // 8)),
            weight_decay=0.1,
            adam_beta2=0.95,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, options.steps // 40),
            logging_nan_inf_filter=False,  # it waits for the GPU at every step
            dataloader_drop_last=True,
            dataloader_pin_memory=on_gpu,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=Blocks(prepared["tokens"]["train"], context),
            data_collator=lambda blocks: {"input_ids": blocks},
            callbacks=[watch],
        )
        trainer.train()
        losses = [[entry["step"], round(entry["loss"], 4)] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "learning_rate": learning_rate,
        "train_seconds": round(time.monotonic() - start, 1),
        "tokens_per_second": round(watch.tokens_per_second),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "losses": losses,
        "validation_curve": watch.points,
    }


def measure(mixer: str, context: int, components: int, seed: int, prepared: dict, options) -> dict:
    """Train and evaluate one row."""
    sizes = {
        "vocab_size": prepared["vocab_size"],
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "max_position_embeddings": context,
        "num_components": components,
    }
    sizes["intermediate_size"] = equal_intermediate_size(mixer, reference=REFERENCE, **sizes)
    config = make_config(mixer, **sizes)
    torch.manual_seed(seed)
    with torch.device(device()):
        model = make_model(mixer, config, redraw_interval=options.redraw_interval)
    learning_rate = options.learning_rates.get(mixer, options.learning_rate)
    row = {
        "mixer": mixer,
        "context": context,
        "components": components,
        "seed": seed,
        "parameters": model.num_parameters(),
        "intermediate_size": config.intermediate_size,
    }
    try:
        row |= train(model, prepared, context, seed, learning_rate, options)
    except torch.cuda.OutOfMemoryError as error:
        return {**row, "refused": str(error).split("\n")[0]}
    if not math.isfinite(row["losses"][-1][1]):
        return {**row, "refused": "the training loss became NaN or infinite"}
    row |= evaluate(model, prepared, context)
    row |= extrapolate(model, prepared["tokens"]["wikitext_test_detokenized"], context)
    if options.save is not None and MIXERS[mixer].attention is None and MIXERS[mixer].layer is None:
        folder = options.save / f"{mixer}-{context}-{components}-{seed}"
        model.save_pretrained(folder)
        if tokenizer_folder(options.prepared).exists():
            AutoTokenizer.from_pretrained(tokenizer_folder(options.prepared)).save_pretrained(folder)
    return row


def wanted_rows(options: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """Mixer, context, components and seed of every row, seed by seed."""
    if options.rows:
        rows = []
        for text in options.rows:
            mixer, context, *rest = text.split(":")
            if mixer not in MIXERS:
                raise SystemExit(f"error: there is no mixer {mixer!r} in {text!r}. Choose one of {list(MIXERS)}.")
            components, seed = (int(x) for x in (*rest, *(COMPONENTS, 0)[len(rest) :]))
            rows.append((mixer, int(context), components, seed))
        return rows
    return [
        (mixer, context, components, seed)
        for seed in options.seeds
        for context in options.contexts
        for components in options.components
        for mixer in options.mixers
    ]


def run(options: argparse.Namespace) -> None:
    """Measure the rows that the output file does not hold yet."""
    prepared = load(options.prepared)
    available = len(prepared["tokens"]["train"]) // options.tokens_per_step
    options.steps = min(options.steps or available, available)
    setting = {
        **{name: getattr(options, name) for name in SETTING},
        "vocab_size": prepared["vocab_size"],
        "equal_parameters_with": REFERENCE,
    }
    results = Results(options.output, "language_modeling", setting)
    for row in wanted_rows(options):
        results.measure(":".join(map(str, row)), lambda row=row: measure(*row, prepared, options))


def learning_rates(words: list[str]) -> dict[str, float]:
    """`mamba2=2e-3` and the like."""
    return {mixer: float(rate) for mixer, _, rate in (word.partition("=") for word in words)}


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with wikipedia-long and wikitext-103, for --prepare")
    parser.add_argument(
        "--prepare", type=Path, metavar="FILE", help="tokenize into this file (.xz: packed), and no more"
    )
    parser.add_argument("--max_tokens", type=int, help="to train on, in the prepared file; default: all")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, help="of the tokenizer that --prepare trains")
    parser.add_argument("--prepared", type=Path, metavar="FILE", help="the file that --prepare wrote")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--rows", nargs="+", help="mixer:context[:components[:seed]], instead of the next four")
    parser.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024])
    parser.add_argument("--components", type=int, nargs="+", default=[COMPONENTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="default: one pass over the training text")
    parser.add_argument("--tokens_per_step", type=int, default=65_536)
    parser.add_argument("--micro_tokens", type=int, default=65_536, help="per forward pass, but at least a sequence")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--learning_rates", nargs="+", default=[], metavar="MIXER=RATE", help="where it is another one"
    )
    parser.add_argument("--redraw_interval", type=int, default=100, help="steps between draws of performer_redrawn")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="the blocks, and the head with the loss; default: on a GPU",
    )
    parser.add_argument("--save", type=Path, help="folder for the trained models that the package can load")
    parser.add_argument("--table", action="store_true", help="print the table of the output file, and train nothing")
    parser.add_argument("--plot", action="store_true", help=f"draw {FIGURE.relative_to(ROOT)}, and train nothing")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    options.learning_rates = learning_rates(options.learning_rates)

    if options.prepare:
        if options.data is None:
            parser.error("--prepare needs --data, the folder with wikipedia-long and wikitext-103")
        print(prepare(options.data, options.prepare, options.vocab_size, options.max_tokens))
        return
    if not (options.table or options.plot):
        if options.prepared is None:
            parser.error("training needs --prepared FILE; --prepare FILE --data DATA makes it")
        run(options)
    if not options.output.exists():
        parser.error(f"{options.output} does not exist: nothing was measured yet")
    report = json.loads(options.output.read_text())
    print(table(report))
    if options.plot:
        plot(report, options.figure)


if __name__ == "__main__":
    main()
