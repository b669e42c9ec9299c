# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The tables and the figure of `language_modeling.py`, from its JSON file."""

import statistics
from pathlib import Path

from benchmarks.lib.training import COLOURS, save_figure
from benchmarks.rivals.mixers import MIXERS


TEST = "wikitext_test_word_perplexity"
DETOKENIZED = "wikitext_test_detokenized_word_perplexity"
FIGURE_COLOURS = {**COLOURS, "gma_paper_wide": "#b5d3f0", "performer_redrawn": "#e8a27c", "hybrid": "#6a4fb3"}


def groups(rows: dict[str, dict]) -> list[list[dict]]:
    """The rows that differ in nothing but the seed, together: by context, then components, then mixer as in `MIXERS`."""
    order = list(MIXERS)
    found: dict[tuple, list[dict]] = {}
    for row in rows.values():
        found.setdefault((row["context"], row["components"], order.index(row["mixer"])), []).append(row)
    return [found[key] for key in sorted(found)]


def mean_and_spread(group: list[dict], name: str) -> str:
    """`24.1 ± 0.2`: the mean over seeds and their standard deviation."""
    values = [row[name] for row in group]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def label(group: list[dict], rows: dict[str, dict]) -> str:
    """The mixer, with its number of components where rows differ in that."""
    mixer, components = group[0]["mixer"], group[0]["components"]
    several = len({row["components"] for row in rows.values() if row["mixer"] == mixer}) > 1
    return MIXERS[mixer].title + (f", {components} components" if several else "")


def table(report: dict) -> str:
    """Markdown: quality, speed and memory of every mixer; below it, perplexity by position past the length of training."""
    rows = report["rows"]
    lines = [
        "| mixer | context | parameters | seeds | Wikipedia validation | WikiText-103 valid, per word | test, per word | "
        "test detokenised, per word | tokens/s | memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    trained = []
    for group in groups(rows):
        head = f"| {label(group, rows)} | {group[0]['context']:,} | {group[0]['parameters'] / 1e6:.1f} M"
        refused = [row["refused"] for row in group if "refused" in row]
        group = [row for row in group if "refused" not in row]
        if refused:
            lines.append(f"{head} | {len(refused)} | refused: {refused[0]} |" + " |" * 5)
        if not group:
            continue
        trained.append(group)
        scores = [
            mean_and_spread(group, name)
            for name in ("wikipedia_valid_perplexity", "wikitext_valid_word_perplexity", TEST, DETOKENIZED)
        ]
        memory = group[0]["peak_memory_gib"]
        lines.append(
            f"{head} | {len(group)} | {' | '.join(scores)} | "
            f"{statistics.median(row['tokens_per_second'] for row in group):,.0f} | "
            f"{'' if memory is None else f'{memory:.1f} GiB'} |"
        )
    return "\n".join(lines + extrapolation_tables(trained, rows))


def summary(report: dict) -> str:
    """Markdown: quality and speed of every mixer, of the shortest context and the fewest components, the best first."""
    rows = [row for row in report["rows"].values() if "refused" not in row]
    context = min(row["context"] for row in rows)
    fewest = min(row["components"] for row in rows)
    lines = {}
    for group in groups({str(i): row for i, row in enumerate(rows)}):
        if (group[0]["context"], group[0]["components"]) == (context, fewest):
            scores = " | ".join(mean_and_spread(group, name) for name in ("wikipedia_valid_perplexity", DETOKENIZED))
            speed = statistics.median(row["tokens_per_second"] for row in group)
            line = f"| {MIXERS[group[0]['mixer']].title} | {len(group)} | {scores} | {speed:,.0f} |"
            lines[statistics.mean(row["wikipedia_valid_perplexity"] for row in group)] = line
    head = "| mixer | seeds | perplexity, Wikipedia | perplexity per word, WikiText-103 test | tokens/s in training |"
    return "\n".join([head, "|---|---:|---:|---:|---:|", *(lines[score] for score in sorted(lines))])


def extrapolation_tables(trained: list[list[dict]], rows: dict[str, dict]) -> list[str]:
    """One table per context: perplexity by position in windows four times as long, in eighths of the window."""
    lines = []
    for context in dict.fromkeys(group[0]["context"] for group in trained):
        own = [group for group in trained if group[0]["context"] == context]
        if not any(group[0]["extrapolation"] for group in own):
            continue
        width = next(group[0]["extrapolation_bucket"] for group in own if group[0]["extrapolation"])
        # Pairs of buckets: half a length of training each
        heads = [f"{i * width + 1:,} to {(i + 2) * width:,}" for i in range(0, 4 * context // width, 2)]
        lines += [
            "",
            f"Perplexity per token by position, trained on {context:,} tokens (WikiText-103 test, detokenised):",
            "",
            f"| mixer | {' | '.join(heads)} |",
            "|---|" + "---:|" * len(heads),
        ]
        for group in own:
            title = label(group, rows)
            curves = [row["extrapolation"] for row in group if row["extrapolation"]]
            if curves:
                means = [statistics.geometric_mean(values) for values in zip(*curves, strict=True)]
                pairs = [statistics.geometric_mean(means[i : i + 2]) for i in range(0, len(means), 2)]
                lines.append(f"| {title} | {' | '.join(f'{x:.1f}' for x in pairs)} |")
            else:
                lines.append(f"| {title} | not possible: {group[0]['extrapolation_note']} |" + " |" * (len(heads) - 1))
    return lines


def plot(report: dict, path: Path) -> None:
    """Learning curves, and the test perplexity as bars, of the shortest context and the fewest components."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    rows = {name: row for name, row in report["rows"].items() if "refused" not in row}
    if not rows:
        raise SystemExit("error: there are no results to draw.")
    context = min(row["context"] for row in rows.values())
    components = min(row["components"] for row in rows.values() if row["context"] == context)
    shown = [group for group in groups(rows) if (group[0]["context"], group[0]["components"]) == (context, components)]
    shown.sort(key=lambda group: statistics.mean(row[DETOKENIZED] for row in group))
    tokens_per_step = report["setting"]["tokens_per_step"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.25, 1), layout="constrained")

    for group in shown:
        colour = FIGURE_COLOURS[group[0]["mixer"]]
        curves = [row["validation_curve"] for row in group]
        steps = [step for step, _ in curves[0]]
        values = [statistics.mean(values) for values in zip(*([v for _, v in curve] for curve in curves), strict=True)]
        left.plot([tokens_per_step * step / 1e6 for step in steps], values, color=colour, marker="o", markersize=3)
    left.set_yscale("log")
    left.set_xlabel("training tokens (millions)")
    left.set_ylabel("perplexity per token")
    left.set_title(f"Wikipedia validation, context {context:,} (colours as on the right)", loc="left", fontsize=11)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    left.yaxis.set_major_formatter("{x:.0f}")
    left.yaxis.set_minor_locator(NullLocator())
    left.grid(axis="y", color="#dddddd", linewidth=0.6)

    means = [statistics.mean(row[DETOKENIZED] for row in group) for group in shown]
    colours = [FIGURE_COLOURS[group[0]["mixer"]] for group in shown]
    titles = [MIXERS[group[0]["mixer"]].title.split(":")[0] for group in shown]
    bars = right.barh(titles, means, color=colours, height=0.65)
    right.bar_label(bars, [f"{mean:.1f}" for mean in means], padding=3)
    right.invert_yaxis()
    right.set_xlim(0, 1.15 * max(means))
    right.set_xlabel("perplexity per word")
    right.set_title("WikiText-103 test, detokenised", loc="left", fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
