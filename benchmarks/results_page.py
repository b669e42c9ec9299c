#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
docs/results.md: every table and figure that was measured, with the command that makes it.

    python benchmarks/results_page.py            # write the page anew
    python benchmarks/results_page.py --check    # exit with 1 if the page is not what the results say

Numbers come from `benchmarks/results/*.json` through the functions by which the benchmarks print their own tables; the prose
says what was measured and what differs from the paper's setting. What has no results yet has no section.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` can be imported

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
HEAD = """\
# Results

Every number on this page was measured by a script of this repository and is kept in `benchmarks/results`; \
`python benchmarks/results_page.py` writes the page from there. Whatever a script measured already is not measured again \
unless its JSON file is moved away.

The paper ([arXiv:2606.18283](https://arxiv.org/abs/2606.18283)) reports four things: memory that grows linearly with the \
length, long-context classification beside attention-style models, language modelling on WikiText-103 ahead of linear and \
random-feature attention and behind softmax and Mamba, and an analysis of the learned responsibilities. The sections say \
where our setting differs from it. The sizes here are those that fit one GPU and some minutes a model, so compare numbers \
within a table, and not with numbers of other work."""


@dataclass
class Section:
    """One experiment.

    Attributes:
        title: of the section.
        files: pattern of its results, which may be of several devices.
        text: what is measured, how, and what differs from the paper's setting.
        body: makes the tables of one file's content.
        command: what makes all of a file that several runs have added to, `{rows}` being the names of its rows; by default what
            the file says.
        figures: names of figures that do not begin with the name of the file.
    """

    title: str
    files: str
    text: str
    body: Callable[[dict], str]
    command: str | None = None
    figures: tuple[str, ...] = ()


class StoredReport:
    """Results that the GPU benchmarks wrote, as their tables ask for them; needs no GPU."""

    def __init__(self, content: dict):
        self.content = content

    def rows(self, **key) -> list[dict]:
        return [row for row in self.content["rows"] if all(row.get(name) == value for name, value in key.items())]

    def get(self, field: str, **key) -> float | None:
        return next((row[field] for row in self.rows(**key) if row.get(field) is not None), None)


def printed(function: Callable, *arguments) -> str:
    """What a benchmark prints, as a block of text."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        function(*arguments)
    return f"```text\n{output.getvalue().strip()}\n```"


def own_table(module: str, field: str | None = "rows", function: str = "table") -> Callable[[dict], str]:
    """The table of a benchmark, of one field of its results or of all of them; imported when it is needed."""

    def body(content: dict) -> str:
        table = getattr(importlib.import_module(module), function)
        return table(content if field is None else content[field]).strip()

    return body


def own_printed_tables(module: str) -> Callable[[dict], str]:
    """What the `print_tables` of a GPU benchmark prints, and the targets that it missed; imported when it is needed."""

    def body(content: dict) -> str:
        tables = printed(importlib.import_module(module).print_tables, StoredReport(content))
        return f"{tables}\n\n{targets(content)}".strip()

    return body


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cpu_attention(content: dict) -> str:
    return importlib.import_module("benchmarks.kernels.attention_cpu").markdown_table(content["rows"])


def gpu_attention(content: dict) -> str:
    """Forward and backward beside FlashAttention, then everything else, then the targets."""
    report = StoredReport(content)

    def milliseconds(name: str, length: int) -> float | None:
        return report.get("forward_backward_ms", part="speed", rival=name, length=length)

    lines = []
    for length in sorted({row["length"] for row in report.rows(part="speed", rival="SDPA flash")}):
        softmax = milliseconds("SDPA flash", length)
        cells = [f"{length:,}", "" if softmax is None else f"{softmax:.1f} ms"]
        for name in ("GMA normalised", "GMA un-normalised, decay"):
            own = milliseconds(name, length)
            cells += ["", ""] if own is None else [f"{own:.1f} ms", "" if softmax is None else f"{softmax / own:.1f}x"]
        lines.append(cells)
    parts = []
    if lines:
        columns = [
            "tokens of a sequence",
            "SDPA (FlashAttention)",
            "GMA",
            "speed-up",
            "GMA with forgetting",
            "speed-up",
        ]
        parts.append(markdown_table(columns, lines))
    parts.append(printed(importlib.import_module("benchmarks.kernels.attention_gpu").print_tables, report))
    return "\n\n".join([*parts, targets(content)])


def gpu_decode(content: dict) -> str:
    batches, positions = (sorted({row[name] for row in content["rows"]}) for name in ("batch", "position"))
    tables = printed(
        importlib.import_module("benchmarks.kernels.decoding_gpu").print_tables,
        StoredReport(content),
        batches,
        positions,
    )
    return f"{tables}\n\n{targets(content)}"


def targets(content: dict) -> str:
    """What was aimed at and missed."""
    aims = content.get("targets", [])
    missed = [
        f"- {aim['target']}: {aim['measured']:.4g}" for aim in aims if not aim["met"] and aim["measured"] is not None
    ]
    if not aims:
        return ""
    met = sum(aim["met"] for aim in aims)
    return (
        "\n".join([f"{met} of {len(aims)} targets that were set beforehand are met. Missed:", "", *missed])
        if missed
        else (f"All {len(aims)} targets that were set beforehand are met.")
    )


def conversion_smollm2(content: dict) -> str:
    rows = content["rows"]
    original = rows.get("original", {}).get("scores", {}).get("original", {}).get("perplexity")
    lines = []
    for row in rows.values():
        for state, scores in row["scores"].items():
            lines.append(
                [
                    f"{row['title']}: {state}",
                    f"{scores['perplexity']:.2f}",
                    "" if original is None else f"{scores['perplexity'] / original:.3f}",
                    f"{scores['kl']:.4f}" if "kl" in scores else "",
                ]
            )
    noted: dict[str, list[str]] = {}
    for row in rows.values():
        if "note" in row:
            noted.setdefault(row["note"], []).append(row["title"])
    notes = [f"- {note} This holds for: *{'*; *'.join(titles)}*." for note, titles in noted.items()]
    found = ["\n".join(notes), table_by_position(rows)]
    return "\n\n".join(
        [
            markdown_table(["model", "perplexity", "of the original's", "KL per token (nats)"], lines),
            *filter(None, found),
        ]
    )


def table_by_position(rows: dict) -> str:
    """Perplexity along long windows, of every finished model."""
    lines = {}
    for row in rows.values():
        last = list(row["scores"].values())[-1]
        if "by_position" in last:
            lines[row["title"]] = last["by_position"]
    if not lines:
        return ""
    columns = list(next(iter(lines.values())))
    table = markdown_table(
        ["model", *columns], [[title, *(f"{x[name]:.1f}" for name in columns)] for title, x in lines.items()]
    )
    return f"Perplexity by position, in windows of the whole length:\n\n{table}"


def conversion_minilm(content: dict) -> str:
    lines = []
    for name, row in content["rows"].items():
        cosine = list(row["cosine"].values())[-1] if "cosine" in row else {}
        accuracy = row.get("newsgroups", [])
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        lines.append(
            [
                name,
                *(f"{cosine[text]:.4f}" if text in cosine else "" for text in ("WikiText-103", "IMDB")),
                f"{statistics.mean(accuracy):.2f}{spread}" if accuracy else "",
            ]
        )
    columns = ["model", "cosine to the original, WikiText-103", "cosine, IMDB", "accuracy on 20 Newsgroups (%)"]
    return markdown_table(columns, lines)


def scaling(content: dict) -> str:
    module = importlib.import_module("benchmarks.kernels.scaling_report")
    titles = {
        ("forward_backward", "ms"): "Forward and backward pass, milliseconds:",
        ("forward", "ms"): "Forward pass alone, milliseconds:",
        ("forward_backward", "peak_mib"): "Peak memory of forward and backward pass, MiB:",
        ("forward", "peak_mib"): "Peak memory of the forward pass alone, MiB:",
    }
    return "\n\n".join(f"{title}\n\n{module.table(content, *what)}" for what, title in titles.items())


SECTIONS = (
    Section(
        "Language modelling on Wikipedia, measured on WikiText-103",
        "language_modeling",
        "Every model is trained once over the same Wikipedia articles, in the same order, with the same tokenizer and schedule, "
        "and has the same number of parameters within 3%; only the sequence mixer differs. **What differs from the paper:** it "
        "trains on the training part of WikiText-103. These models have read other Wikipedia articles, natural text without "
        "WikiText's spelling (` @-@ `), so that validation and test part of WikiText-103 are texts of another kind than the "
        "training text. On their published spelling Mamba-2 is ahead of the gated block, on the same texts in ordinary spelling "
        "the gated block is. `scripts/train_clm.py` with `--dataset_name Salesforce/wikitext` trains on the real one. The paper's "
        "block is ahead of Performer, as the paper says. It is not ahead of linear attention (elu + 1), other than the paper says: "
        "with the variances that it begins with one component takes nearly every token at first, and it stays far behind; with "
        "wide ones (`variance_init=16`) the two are level. One learning rate served all, none was tuned. More components than 64 "
        "do not help at this size, and 256 cost much time. At a context of 4,096 a step has a quarter of the sequences. Where "
        "there is one seed, there is no spread; Performer with redrawn features (`performer_redrawn`) was not trained.",
        own_table("benchmarks.quality.language_modeling_report", None),
        "python benchmarks/quality/language_modeling.py --data DATA --prepare lm.pt\n"
        "python benchmarks/quality/language_modeling.py --prepared lm.pt --rows {rows}",
    ),
    Section(
        "Language modelling on WikiText-2",
        "wikitext2",
        "Byte-level BPE of 8,192 tokens, context 1,024, 6 epochs, 8 layers of width 384, equal parameters, tokens and schedule. "
        "**What differs from the paper:** the corpus, 50 times smaller than WikiText-103; it is the tokenised one with `<unk>`, "
        "and the articles of our copy of its training part stand in another order than in the official file. Perplexity per "
        "word is the one to compare with other work.",
        own_table("benchmarks.quality.wikitext2", "runs"),
    ),
    Section(
        "Long-context classification",
        "long_context_classification",
        "Bidirectional encoders of equal size and schedule on ListOps (length up to 2,000), IMDB read byte by byte (4,096) and 20 "
        "Newsgroups. **What differs from the paper** and from Long Range Arena: ListOps comes from our own generator, which "
        "follows the published grammar; models are small and train for a fixed number of steps, fewer than the Arena's. **What it "
        "shows:** the gated block is ahead on ListOps and by far on bytes, and two points behind softmax on 20 Newsgroups, where "
        "the 7,532 test posts alone make a standard error of 0.6; there is one seed. On ListOps softmax had only just left the "
        "plateau of guessing when the steps were over. On bytes we take the gated block's short convolution for the reason, which "
        "the other mixers do not have; that was not measured. The paper's block needs the least memory. **Nothing is gained in "
        "time here:** softmax attention is no slower at these lengths, and a step of 20 Newsgroups, with a quarter of the tokens, "
        "takes nearly as long as one of ListOps: with so small models Python decides, not the GPU. The section on scaling "
        "compares the operators.",
        own_table("benchmarks.quality.long_context_classification"),
        "python benchmarks/quality/long_context_classification.py --data DATA --prepare classification.pt.xz\n"
        "python benchmarks/quality/long_context_classification.py --prepared classification.pt.xz\n"
        "python benchmarks/quality/long_context_classification.py --prepared classification.pt.xz --tasks newsgroups --contenders "
        "gma_gated_positions gma_gated_window",
    ),
    Section(
        "Recall",
        "recall",
        "Where a state of fixed size loses: multi-query associative recall (pairs of keys and values, then queries for some of "
        "the keys), and a fact hidden at some depth of a long text. The paper does not report this; we add it because it is the "
        "known weakness of linear-time mixers, with hybrids that show how many softmax layers win it back. **What differs from "
        "Zoology:** a vocabulary of 1,024 instead of 8,192 and some 50 million tokens, so that it takes minutes.\n\n"
        "**What it shows:** GMA loses clearly. Two layers of the gated block with 64 components recall about half of four pairs, "
        "little better than linear attention with a state of the same size; with 256 components most of eight pairs. Mamba-2, "
        "whose state is twice as large again, recalls 64 pairs like softmax attention. One softmax layer among four wins it "
        "back, with a second one the model reaches beyond the lengths of its training. **To know:** these are single runs, and "
        "such tasks are learned suddenly or not at all: a run of the gated block with a longer schedule, which was broken off and "
        "is not in the table, recalled many times as much.\n\n"
        "The needle is one of four facts among random tokens. Mamba-2 finds it always in texts four times as long as those of its "
        "training, and mostly in texts eight times as long; the hybrid at any depth of the lengths that it was trained on, and "
        "beyond them where the fact is near; the gated block alone did not learn to. Nor did softmax attention of two layers, "
        "which says something about its training here rather than about attention: at a lower rate another run, broken off too, "
        "had begun to find it.",
        own_table("benchmarks.quality.recall_report", function="tables"),
        "python benchmarks/quality/recall.py",
        figures=("needle",),
    ),
    Section(
        "Learned responsibilities",
        "responsibilities",
        "The paper's analysis of what the components learn, on the first section's gated model with 64 components (context 1,024, "
        "seed 0; its matrices rounded to bfloat16, as they would be published): the first 100,000 tokens of WikiText-103's test "
        "part in ordinary spelling, in blocks of 1,024. [analysis.md](analysis.md) defines the numbers; "
        "`scripts/analyze_responsibilities.py` shows more of them for any model. **Is usage broad?** In the first three layers it "
        "is, with some 40 components in use per head; in the last four there are 20 to 27, with single heads down to 3 to 6, and "
        "of all components 13% are dead on this text. **Is the alignment with surface categories moderate?** Yes: far above "
        "shuffled categories in every head, on average ten times that of the model before training, and a seventh of the "
        "largest possible. The best aligned head has a component for most of the numbers, one for some of the capitalised words, "
        "one that leans to punctuation and line breaks, and one that takes a large part of the rest, whatever its kind. What "
        "components stand for beyond the surface, this analysis does not say. **What differs from the paper:** the gated block instead of its own, the training text, a short training "
        "(55 million tokens), and the categories, which are ours: compare what is found, not the numbers.",
        own_table("benchmarks.quality.responsibilities_report", None),
    ),
    Section(
        "Scaling with the length",
        "scaling_*",
        "One call of the operator on one causal sequence: 8 heads of dimension 64, 64 components. Mamba-2 is the recurrence of "
        "its published layer of the same width (16 heads of dimension 64, state 128), so it computes more per token. An empty "
        "cell ran out of memory, or was not tried because a call would have taken too long. Exponents are those of the growth "
        "with the length, fitted to the four longest lengths that were measured. Linear attention (elu + 1) and Mamba-2 are "
        "programs in plain PyTorch; fused ones need less time and memory, see flash-linear-attention's kernels in the section on "
        "the operator on a GPU. Times on a CPU are CPU time; on the H200, up to some 32k tokens, those of all but softmax are the "
        "time of launching kernels from Python, on a processor that other trainings shared. Peak memory is all that a call needs: "
        "inputs, outputs, gradients and what lies between. **What differs from the paper:** it reports the memory of its models, "
        "this is the operator alone.",
        scaling,
    ),
    Section(
        "The operator on a CPU",
        "cpu_attention",
        "Forward and backward pass of causal attention: 8 heads, dimension 64, 64 components, float32, beside PyTorch's "
        "`scaled_dot_product_attention` in the same run.",
        cpu_attention,
    ),
    Section(
        "The operator on a GPU",
        "gpu_attention_*",
        "bfloat16, 65,536 tokens in all, 16 heads, dimension 64, 64 components, causal, the mixture as after some training. "
        "The first table is forward and backward pass: *GMA* is the paper's normalised read, *with forgetting* the un-normalised "
        "read of the gated block. [kernels.md](kernels.md) says what bounds the kernels. **What differs from the paper:** it "
        "concedes that its implementation is slower than optimised softmax attention; this one has fused kernels.",
        gpu_attention,
        "python benchmarks/kernels/attention_gpu.py",
    ),
    Section(
        "Training speed on a GPU",
        "gpu_training_*",
        "A language model of 12 layers of width 768, bfloat16 autocast, `torch.compile`, against the same model with softmax.",
        own_printed_tables("benchmarks.kernels.training_gpu"),
        "python benchmarks/kernels/training_gpu.py",
    ),
    Section(
        "Decoding on a GPU",
        "gpu_decode_*",
        "A model of 12 layers of width 768 generates token by token, in bfloat16, at a position of the sequence.",
        gpu_decode,
        "python benchmarks/kernels/decoding_gpu.py",
    ),
    Section(
        "Conversion of SmolLM2-135M-Instruct",
        "conversion_smollm2",
        "Distilled on Wikipedia and books without any language-model loss, so that adapting to Wikipedia does not pass for "
        "recovery (rows that say *fine-tuned* have one). Perplexity on the whole test set of WikiText-103 in windows of 1,024 "
        "tokens. The paper does not convert models. [conversion.md](conversion.md) explains the recipe. Distilled on texts of 4,096 "
        "tokens; the second table goes on to twice that. **To know:** windows come with one sink token, which together see "
        "nearly everything that this small model looks at in 1,024 tokens: before any training the model with random mixtures is "
        "at 1.38 times the original's perplexity, nearer than the calibrated one, whose memory weighs as much as softmax's far "
        "tokens but blurs them. What calibration is worth shows after the training. Rates and the weight of hidden states (which "
        "brought nothing: 29.60 against 29.60 on the validation set after 8 minutes at a rate of 8e-5, and 29.51 at 2e-4) were "
        "chosen on WikiText-103's validation set. The model that was fine-tuned is that of the row *all layers, window + GMA*.",
        conversion_smollm2,
    ),
    Section(
        "Conversion of a sentence encoder (all-MiniLM-L6-v2)",
        "conversion_minilm",
        "All 6 layers converted and distilled on unlabelled text; the cosine is that between the sentence embeddings of original "
        "and converted model, the accuracy that of classifiers fine-tuned from each in the same way.",
        conversion_minilm,
    ),
    Section(
        "Speed of converted models on a GPU",
        "conversion_speed_*",
        "Prefill of one prompt and decoding, of the original with `scaled_dot_product_attention` and of the converted model. "
        "**To know:** a training shared the machine's processor, which decides wherever a call is short: times of single prompts "
        "below 32,768 tokens and of eager decoding say more about Python than about the GPU.",
        own_printed_tables("benchmarks.conversion.speed"),
        "python benchmarks/conversion/speed.py",
    ),
)


def circumstances(content: dict, command: str | None = None) -> str:
    """Commands, devices, dates and versions of a file of results, each said once."""
    rows = content.get("rows", content.get("runs", []))
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    sources = [content, *rows]

    def every(name: str) -> list:
        return list(dict.fromkeys(source[name] for source in sources if name in source))

    dates = sorted({date[:10] for date in every("date")})
    versions = [source["versions"] for source in sources if "versions" in source]
    named = {name: [] for name in ("torch", "triton", "transformers", "flash-linear-attention")}
    for name, found in named.items():
        found += dict.fromkeys(version[name] for version in versions if name in version)
    if "torch" in content:
        named["torch"] = [content["torch"]]
    facts = [content.get("setting", {}).get("device") or ", ".join(every("device"))]
    if "threads" in content:
        facts.append(f"{content['threads']} threads")
    facts += [f"{name} {' and '.join(found)}" for name, found in named.items() if found]
    facts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    commands = command or "\n".join(every("command"))
    if "{rows}" in commands:
        commands = commands.replace("{rows}", " ".join(content["rows"]))
    return f"```bash\n{commands}\n```\n\nMeasured on {'; '.join(facts)}."


def page(results: Path = ROOT / "benchmarks" / "results", figures: Path = ROOT / "docs" / "figures") -> str:
    """The page's text.

    Args:
        results: folder of the JSON files.
        figures: folder of the figures, which are found by the names of the JSON files.
    """
    parts = [HEAD]
    for section in SECTIONS:
        files = sorted(results.glob(f"{section.files}.json"))
        if not files:
            continue
        parts += [f"## {section.title}", section.text]
        for path in files:
            content = json.loads(path.read_text(encoding="utf-8"))
            parts += [circumstances(content, section.command), section.body(content)]
            found = figures_of(path.stem, files, figures)
            named = (figures / f"{name}.png" for name in section.figures)
            for figure in [*sorted(found), *(figure for figure in named if figure.is_file())]:
                title = f"{section.title}: {figure.stem.replace('_', ' ')}"
                parts.append(f"![{title}]({os.path.relpath(figure, PAGE.parent)})")
    return "\n\n".join(part for part in parts if part) + "\n"


def figures_of(stem: str, files: list[Path], figures: Path) -> Iterator[Path]:
    """`stem.png` and `stem_anything.png`, unless that is the figure of another file of results."""
    for path in figures.glob("*.png"):
        others = [file.stem for file in files if file.stem != stem and path.stem.startswith(file.stem)]
        own = path.stem == stem or path.stem.startswith(f"{stem}_")
        if own and not any(len(other) > len(stem) for other in others):
            yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    options = parser.parse_args()
    text = page()
    if options.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"error: {PAGE} is not what the results say; run python benchmarks/results_page.py")
        return
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
