#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The paper's analysis of the learned responsibilities, on a trained language model: is the usage of the components broad, are
there dead ones, do they align with categories of tokens that can be seen on their surface?

    python benchmarks/quality/responsibilities.py MODEL --data DATA --plot
    python benchmarks/quality/responsibilities.py --table

MODEL is a folder with a GMA model and its tokenizer, such as `language_modeling.py --save` leaves; DATA holds `wikitext-103`. The
text is the beginning of WikiText-103's test part, its tokenisation undone. Besides the control of the analysis, categories
shuffled among the tokens, there is a second one, a model of the same configuration before any training: the vectors of tokens
of one kind can lie together without anything having been learned about it. `scripts/analyze_responsibilities.py` makes the
whole report of a model; here is what fits a table, by layer and head.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from benchmarks.lib.command import command
from benchmarks.lib.results import Results, device
from benchmarks.quality.responsibilities_report import ROLES, plot, table
from benchmarks.quality.tasks.language_modeling import detokenize
from gma_hf.analysis import AnalysisError, RoutingReport, analyze
from gma_hf.analysis.report import RoleReport
from gma_hf.commands.shared.analysis import load_model, load_tokenizer, read_texts


TEXT = "WikiText-103 test, tokenisation undone"
NUM_SHUFFLES, SEED = 20, 0
FREQUENT = 0.01  # of the tokens: a category with fewer is no example
EXAMPLES = 4  # tokens per component


def largest_nmi(counts: Tensor) -> Tensor:
    """
    The NMI that these components, of counts `[heads, components, categories]`, would have if each belonged to one category, or
    each category to one component: the entropies of the two bound it, 2 min(H(c), H(k)) / (H(c) + H(k)).
    """
    joint = counts.double() / counts.sum(dim=(1, 2), keepdim=True)
    entropies = [torch.special.entr(joint.sum(dim=dim)).sum(dim=-1) for dim in (2, 1)]
    return 2 * torch.minimum(*entropies) / sum(entropies)


def by_head(role: RoleReport) -> dict[str, list]:
    """What is kept of the queries, or the keys, of a layer: lists with one entry per head."""
    statistics, alignment = role.statistics, role.alignment
    values = {
        "usage_perplexity": statistics.usage_perplexity, "dead_components": statistics.dead_components.sum(dim=-1),
        "entropy": statistics.entropy, "median_margin": statistics.margin_quantile(0.5), "nmi": alignment.nmi,
        "nmi_shuffled": alignment.nmi_shuffled_mean, "nmi_largest": largest_nmi(statistics.category_counts),
        "purity": alignment.purity, "purity_shuffled": alignment.purity_shuffled_mean,
    }  # fmt: skip
    return {
        name: [round(x, 4) if isinstance(x, float) else x for x in numbers.tolist()]
        for name, numbers in values.items()
    }


def best_aligned(report: RoutingReport) -> dict:
    """The head that tells the categories apart best, and for each frequent one the component that comes closest to it."""
    heads = {role: report.best_aligned(role) for role in ROLES}
    role = max(ROLES, key=lambda role: float(getattr(heads[role][0], role).alignment.nmi[heads[role][1]]))
    layer, head = heads[role]
    counts = getattr(layer, role).statistics.category_counts[head].double()  # [components, categories]
    components = []
    for index, (category, size) in enumerate(report.category_counts.items()):
        if size < FREQUENT * report.num_tokens:
            continue
        # Tokens that are in both, of those that are in either
        overlap = counts[:, index] / (size + counts.sum(dim=1) - counts[:, index])
        component = int(overlap.argmax())
        taken = counts[component, index].item()
        shares = {"share_of_category": size, "share_of_component": counts[component].sum().item()}
        tokens = [token for token, _, _ in report.top_tokens(layer, head, component, role, EXAMPLES)]
        shares = {name: round(taken / of, 4) for name, of in shares.items()}
        components.append({"category": category, "component": component, **shares, "tokens": tokens})
    return {"role": role, "layer": layer.label, "head": head, "components": components}


def measure(model: PreTrainedModel, tokenizer, text: str, options: argparse.Namespace) -> dict:
    """One row: the analysis of one model."""
    names = ("max_tokens", "block_size", "batch_size")
    sizes = {name: getattr(options, name) for name in names}
    report = analyze(model, tokenizer, text, num_shuffles=NUM_SHUFFLES, seed=SEED, **sizes)
    return {
        "num_tokens": report.num_tokens,
        "num_components": report.layers[0].keys.statistics.usage.shape[-1],
        "categories": report.category_counts,
        "layers": [
            {"layer": layer.label, **{role: by_head(getattr(layer, role)) for role in ROLES}}
            for layer in report.layers
        ],
        "best_aligned": best_aligned(report),
    }


def untrained(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration, as it is before training."""
    torch.manual_seed(SEED)
    return AutoModel.from_config(model.config).to(model.device).eval()


def run(options: argparse.Namespace) -> None:
    """Measure the rows that the output file does not hold yet."""
    try:
        text = detokenize("".join(read_texts([str(options.data / "wikitext-103" / "test.txt.xz")]).pieces()))
        model, tokenizer = load_model(str(options.model), str(device())), load_tokenizer(str(options.model))
        setting = {"model": options.model.resolve().name, "text": TEXT, "max_tokens": options.max_tokens}
        setting |= {"block_size": options.block_size, "num_shuffles": NUM_SHUFFLES, "seed": SEED}
        results = Results(options.output, "responsibilities", setting)
        for name, make in {"trained": lambda model: model, "untrained": untrained}.items():
            results.measure(name, lambda make=make: measure(make(model), tokenizer, text, options))
    except AnalysisError as error:
        sys.exit(f"error: {error}")


def add_options(add) -> None:
    add("model", type=Path, nargs="?", metavar="MODEL", help="folder of the model and its tokenizer")
    add("--data", type=Path, help="folder with wikitext-103/test.txt.xz")
    add("--max_tokens", type=int, default=100_000, help="of the text")
    add("--block_size", type=int, default=1024, help="tokens per forward pass: the length of training")
    add("--batch_size", type=int, default=4, help="blocks per forward pass")


def main() -> None:
    command(__doc__, "responsibilities", add_options, run, table, plot, needs=("model", "data"))


if __name__ == "__main__":
    main()
