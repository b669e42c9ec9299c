# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The tables and the figure of `language_modeling.py`, from its JSON file."""

import statistics

from benchmarks.lib.tables import COLOURS, GREY, clean, label_ends, markdown, mean_and_spread, of_best_rate, pyplot
from benchmarks.rivals.mixers import MIXERS, make_config, state_per_layer


VALIDATION = "wikipedia_valid_perplexity"
TEST = "wikitext_test_word_perplexity"
DETOKENIZED = "wikitext_test_detokenized_word_perplexity"


def groups(rows: dict[str, dict]) -> list[list[dict]]:
    """
    The rows that differ in nothing but the seed, together: by context, then components, then mixer as in `MIXERS`. Of several
    learning rates the one with the best validation perplexity.
    """
    order = list(MIXERS)

    def score(own: list[dict]) -> float:
        known = [row[VALIDATION] for row in own if VALIDATION in row]
        return -statistics.mean(known) if known else -float("inf")

    best = of_best_rate(
        rows.values(),
        key=lambda row: (row["context"], row["components"], order.index(row["mixer"])),
        rate=lambda row: row.get("learning_rate"),
        score=score,
    )
    return [best[key] for key in sorted(best)]


def spread_of(group: list[dict], name: str) -> str:
    return mean_and_spread([row[name] for row in group])


def state(row: dict, setting: dict) -> str:
    """Numbers that a layer keeps of what it has read."""
    sizes = {"hidden_size": setting["hidden_size"], "num_attention_heads": setting["heads"]}
    sizes |= {"num_hidden_layers": setting["layers"], "num_components": row["components"]}
    number = state_per_layer(row["mixer"], make_config(row["mixer"], **sizes))
    return "grows" if number is None else f"{number:,}"


def label(group: list[dict], rows: dict[str, dict]) -> str:
    """The mixer, with its number of components where rows differ in that."""
    mixer, components = group[0]["mixer"], group[0]["components"]
    several = len({row["components"] for row in rows.values() if row["mixer"] == mixer}) > 1
    return MIXERS[mixer].title_of(group[0]) + (f", {components} components" if several else "")


def speed(group: list[dict]) -> str:
    """Tokens per second in training, of rows that had a GPU of their own."""
    alone = [row["tokens_per_second"] for row in group if row.get("rows_per_gpu", 1) == 1]
    return f"{statistics.median(alone):,.0f}" if alone else ""


def table(report: dict) -> str:
    """Markdown: quality, speed and memory of every mixer; below it, repeated pairs, and perplexity by position."""
    rows = report["rows"]
    columns = ["mixer", "context", "parameters", "state per layer", "seeds", "Wikipedia validation"]
    columns += ["WikiText-103 valid, per word", "test, per word", "test detokenised, per word", "tokens/s", "memory"]
    lines, trained = [], []
    for group in groups(rows):
        head = [label(group, rows), f"{group[0]['context']:,}", f"{group[0]['parameters'] / 1e6:.1f} M"]
        head.append(state(group[0], report["setting"]))
        refused = [row["refused"] for row in group if "refused" in row]
        group = [row for row in group if "refused" not in row]
        if refused:
            lines.append([*head, str(len(refused)), f"refused: {refused[0]}", *[""] * 5])
        if not group:
            continue
        trained.append(group)
        names = (VALIDATION, "wikitext_valid_word_perplexity", TEST, DETOKENIZED)
        memory = group[0]["peak_memory_gib"]
        cost = [speed(group), "" if memory is None else f"{memory:.1f} GiB"]
        lines.append([*head, str(len(group)), *(spread_of(group, name) for name in names), *cost])
    return "\n".join([markdown(columns, lines), *pair_table(trained, rows), *extrapolation_tables(trained, rows)])


def pair_table(trained: list[list[dict]], rows: dict[str, dict]) -> list[str]:
    """Perplexity of tokens that complete a pair which the window has shown before, and of all others."""
    lines, parts = [], ("wikipedia_valid", "wikitext_test_detokenized")
    names = [f"{part}_{kind}_perplexity" for part in parts for kind in ("repeated", "other")]
    for group in trained:
        if all(names[0] in row for row in group):
            head = [label(group, rows), f"{group[0]['context']:,}", f"{group[0].get('learning_rate'):g}"]
            lines.append([*head, *(spread_of(group, name) for name in names)])
    if not lines:
        return []
    columns = ["mixer", "context", "rate", "Wikipedia, repeated pairs", "other tokens"]
    columns += ["WikiText-103 test, repeated pairs", "other tokens"]
    title = (
        "Perplexity per token, of tokens that complete a pair which the window has shown before, and of all others:"
    )
    return ["", title, "", markdown(columns, lines)]


def summary(report: dict) -> str:
    """Markdown: quality and speed of every mixer, of the shortest context and the fewest components, the best first."""
    rows = [row for row in report["rows"].values() if "refused" not in row]
    context = min(row["context"] for row in rows)
    fewest = min(row["components"] for row in rows)
    lines = {}
    for group in groups({str(i): row for i, row in enumerate(rows)}):
        if (group[0]["context"], group[0]["components"]) == (context, fewest):
            scores = [spread_of(group, name) for name in (VALIDATION, DETOKENIZED)]
            line = [MIXERS[group[0]["mixer"]].title_of(group[0]), str(len(group)), *scores, speed(group)]
            lines[statistics.mean(row[VALIDATION] for row in group)] = line
    columns = ["mixer", "seeds", "perplexity, Wikipedia", "perplexity per word, WikiText-103 test"]
    ordered = [lines[score] for score in sorted(lines)]
    if not any(line[-1] for line in ordered):  # rows that shared a GPU
        return markdown(columns, [line[:-1] for line in ordered])
    return markdown([*columns, "tokens/s in training"], ordered)


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
        cells = []
        for group in own:
            curves = [row["extrapolation"] for row in group if row["extrapolation"]]
            shown = [f"not possible: {group[0].get('extrapolation_note')}", *[""] * (len(heads) - 1)]
            if curves:
                means = [statistics.geometric_mean(values) for values in zip(*curves, strict=True)]
                shown = [f"{statistics.geometric_mean(means[i : i + 2]):.1f}" for i in range(0, len(means), 2)]
            cells.append([label(group, rows), *shown])
        title = f"Perplexity per token by position, trained on {context:,} tokens (WikiText-103 test, detokenised):"
        lines += ["", title, "", markdown(["mixer", *heads], cells)]
    return lines


def plot(report: dict):
    """Learning curves, and the test perplexity as bars, of the shortest context and the fewest components."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = {name: row for name, row in report["rows"].items() if "refused" not in row}
    if not rows:
        raise SystemExit("error: there are no results to draw.")
    context = min(row["context"] for row in rows.values())
    components = min(row["components"] for row in rows.values() if row["context"] == context)
    shown = [group for group in groups(rows) if (group[0]["context"], group[0]["components"]) == (context, components)]
    means = {group[0]["mixer"]: statistics.mean(row[DETOKENIZED] for row in group) for group in shown}
    shown.sort(key=lambda group: means[group[0]["mixer"]])
    colours = [COLOURS.get(group[0]["mixer"], GREY) for group in shown]
    million = report["setting"]["tokens_per_step"] / 1e6
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 4.4), width_ratios=(1.4, 1), layout="constrained")
    ends = []
    for group, colour in zip(shown, colours, strict=True):
        curves = [row["validation_curve"] for row in group]
        values = [statistics.mean(values) for values in zip(*([v for _, v in curve] for curve in curves), strict=True)]
        left.plot([million * step for step, _ in curves[0]], values, color=colour, marker="o", markersize=3)
        ends.append((million * curves[0][-1][0], values[-1], MIXERS[group[0]["mixer"]].name.split(":")[0], colour))
    left.set(yscale="log", xlabel="training tokens (millions)", ylabel="perplexity per token")
    left.set_title(f"Wikipedia validation, context {context:,}", loc="left", fontsize=11)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    left.yaxis.set_major_formatter("{x:.0f}")
    left.yaxis.set_minor_locator(NullLocator())
    left.grid(axis="y", color="#dddddd", linewidth=0.6)

    numbers = [means[group[0]["mixer"]] for group in shown]
    titles = [MIXERS[group[0]["mixer"]].name.split(":")[0] for group in shown]
    bars = right.barh(titles, numbers, color=colours, height=0.65)
    right.bar_label(bars, [f"{number:.1f}" for number in numbers], padding=3)
    right.invert_yaxis()
    right.set(xlim=(0, 1.15 * max(numbers)), xlabel="perplexity per word")
    right.set_title("WikiText-103 test, detokenised", loc="left", fontsize=11)
    clean(left, right)
    label_ends(left, ends)
    return figure
