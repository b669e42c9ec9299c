# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The report as files: one self-contained HTML page, and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ..plots import (
    import_pyplot,
    plot_affinity,
    plot_alignment,
    plot_categories,
    plot_entropy,
    plot_margin,
    plot_route,
    plot_stability,
    plot_usage,
)
from ..report import LayerReport, RoutingReport
from ..surface import CATEGORIES
from .reading import COLUMNS, reading
from .svg import STYLE, inline_svg


if TYPE_CHECKING:
    from matplotlib.figure import Figure


SCROLL_HINT = '<p class="hint" aria-hidden="true">Wider than the screen: move sideways \u2192</p>'
TEXT, REFLOW = ' class="text"', ' class="reflow"'
MAX_HEADS = 256  # largest number of heads whose components the page lists; the JSON file lists all
MAX_COMPONENTS = 12  # the most used ones of each head
CSS = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1c2024; --soft: #5b636c; --line: #d9dde2; --panel: #f3f4f6;
  --accent: #1a5fa8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e8ea; --soft: #a0a8b1; --line: #353b42;
  --panel: #1d2125; --accent: #7db7f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 1.25rem 0 .4rem; }
a { color: var(--accent); } p, dd { max-width: 46rem; } .soft, figcaption { color: var(--soft); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; top: .5rem; background: var(--page);
  padding: .5rem 1rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; }
figure { margin: 1rem 0; } figure svg { width: 100%; min-width: 36rem; height: auto; } figcaption { font-size: .92rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom: 2px solid var(--line); }
.text { text-align: left; } code { font-family: ui-monospace, monospace; font-size: .88em; background: var(--panel);
  padding: .08em .3em; border-radius: 3px; white-space: pre; }
td.text > span { display: inline-block; margin-right: .7rem; } td.text code { margin-right: .35rem; }
.scroll + .scroll { margin-top: 1rem; }
.hint { display: none; color: var(--soft); font-size: .85rem; margin: 0 0 .2rem; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; } h1 { font-size: 1.35rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.15rem; } .hint { display: block; } th, td { padding: .25rem .45rem; }
  .reflow thead { display: none; } .reflow tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .reflow th, .reflow td { display: block; border: 0; padding: .05rem 0; text-align: left; }
  .reflow td::before { content: attr(data-column) ": "; color: var(--soft); } }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; } dt { font-weight: 600; } dd { margin: 0 0 .6rem 1.25rem; }
@media print { details { break-inside: avoid; } }
"""
DEFINITIONS = {
    "Responsibility": "the posterior probability γ of a component given a query or a key. A key writes its value to the "
    "components in these shares, a query reads from them in these shares.",
    "Usage": "the mean responsibility of a component over all tokens; a head's usage sums to 1.",
    "Usage perplexity": "exp of the entropy of the usage: how many components are effectively in use, from 1 to C.",
    "Dead components": "those with a usage below a tenth of an equal share, 1 / (10 C).",
    "Entropy": "of a token's responsibilities, mean over tokens, in nats: 0 when each token has one component, log C when "
    "all components are alike to it.",
    "Margin": "difference of the two largest logits: near 0, a token is about to change its route.",
    "Stability bound": "the largest distance of a component's gradient g from the mean gradient at a token. To first order "
    "a step h of a query or key changes its responsibilities by no more than this times the length of h.",
    "Sensitivity": "the Frobenius norm of the derivative of the responsibilities: at most the stability bound.",
    "NMI": "mutual information of a token's most responsible component and its surface category, over the mean of their "
    "entropies: 0 is independent, 1 is the same.",
    "Purity": "share of tokens whose category is the most frequent one of their component.",
    "Shuffled": "the same measure after shuffling the categories among the tokens: what chance gives.",
    "Top tokens": "of a component: the tokens with the largest sum of (responsibility - usage) over their occurrences. The "
    "number is the mean responsibility.",
}


def write_report(report: RoutingReport, output_dir: str | Path, position: int | None = None) -> tuple[Path, Path]:
    """
    Write `report.html` and `report.json`.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].
        output_dir (`str` or `Path`): the folder for the files. It is created if it does not exist.
        position (`int`, *optional*): position of the token in the excerpt whose route is drawn; by default
            [`Excerpt.shown_position`].

    Returns:
        `tuple[Path, Path]`: the paths of the two files.

    Raises:
        AnalysisError: if the excerpt has no such position.
    """
    page = html_page(report, position)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    html_path, json_path = folder / "report.html", folder / "report.json"
    html_path.write_text(page, encoding="utf-8")
    json_path.write_text(json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return html_path, json_path


def html_page(report: RoutingReport, position: int | None = None) -> str:
    """
    The report as one HTML page, without scripts and without external files.

    Args:
        report ([`RoutingReport`]): the result of [`analyze`].
        position (`int`, *optional*): position of the token in the excerpt whose route is drawn; by default
            [`Excerpt.shown_position`].

    Returns:
        `str`: the page.
    """
    sections = [
        ("summary", "Summary", _summary(report)),
        ("usage", "Usage", _usage(report)),
        ("margins", "Margins and stability", _margins(report)),
        ("alignment", "Alignment with token categories", _alignment(report)),
        ("excerpt", "A closer look at the beginning", _excerpt(report, position)),
        ("components", "Components of every head", _components(report)),
        ("definitions", "Definitions", _definitions()),
    ]
    links = "".join(f'<li><a href="#{identifier}">{title}</a></li>' for identifier, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{identifier}"><h2 id="{identifier}" tabindex="-1">{title}</h2>{content}</section>\n'
        for identifier, title, content in sections
    )
    title = f"Responsibilities of {escape(report.model_name)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the content</a>\n<header><h1>{title}</h1>\n'
        f'<p class="soft">Model type {escape(report.model_type)}; {report.num_tokens:,} tokens of '
        f"{escape(report.text_name)} in blocks of {report.block_size}; gma_hf {__version__}</p></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main" tabindex="-1">\n{body}</main>\n</body>\n</html>\n'
    )


def _summary(report: RoutingReport) -> str:
    rows = []
    for layer in report.layers:
        for role in ("keys", "queries"):
            statistics, alignment = getattr(layer, role).statistics, getattr(layer, role).alignment
            num_components = statistics.usage.shape[-1]
            rows.append(
                [
                    f'<th scope="row" class="text">{escape(layer.label)}</th>',
                    f'<td class="text">{role}</td>',
                    _cell(f"{statistics.usage_perplexity.mean():.1f} of {num_components}"),
                    _cell(f"{statistics.dead_components.sum()} of {statistics.usage.numel()}"),
                    _cell(f"{statistics.entropy.mean():.2f}"),
                    _cell(f"{statistics.margin_quantile(0.5).mean():.2f}"),
                    _cell(f"{statistics.stability_bound.mean():.2f}"),
                    _cell(f"{alignment.nmi.mean():.3f}"),
                    _cell(f"{alignment.nmi_shuffled_mean.mean():.3f}"),
                    _cell(f"{alignment.purity.mean():.2f}"),
                    _cell(f"{alignment.purity_shuffled_mean.mean():.2f}"),
                ]
            )
    head = ["Layer", "Of", "Usage perplexity", "Dead components", "Entropy", "Median margin", "Stability bound"]
    head += ["NMI", "shuffled", "Purity", "shuffled"]
    layer, best = report.best_aligned()
    nmi = layer.keys.alignment.nmi[best]
    return (
        _reading(report)
        + "<p>Means over the heads of a layer; dead components are counted. Keys say where tokens write, queries where they "
        f"read. The head whose keys tell the categories apart best is head {best} of layer {escape(layer.label)} "
        f'(NMI {nmi:.3f}). <a href="#definitions">What the words mean</a>.</p>'
        + _table("Statistics by layer", head, rows, (0, 1))
    )


def _reading(report: RoutingReport) -> str:
    rows = []
    for row in reading(report):
        values = [
            f'<td{TEXT if column == "A good value" else ""} data-column="{column}">{escape(value)}</td>'
            for column, value in zip(COLUMNS, row[1:], strict=True)
        ]
        rows.append([f'<th scope="row" class="text">{row[0]}</th>', *values])
    return _table("How to read the numbers", ["Mean over all heads", *COLUMNS], rows, (0, 4), reflows=True)


def _usage(report: RoutingReport) -> str:
    return (
        _figure(lambda: plot_usage(report), "usage-keys", "Where keys write: broad usage is bright to the right.")
        + _figure(lambda: plot_usage(report, "queries"), "usage-queries", "Where queries read.")
        + _figure(lambda: plot_entropy(report), "entropy", "Mean entropy of the responsibilities, one mark per head.")
    )


def _margins(report: RoutingReport) -> str:
    return _figure(
        lambda: plot_margin(report), "margin", "The smaller a margin, the closer a token is to another route."
    ) + _figure(lambda: plot_stability(report), "stability", "Means over tokens, one mark per head.")


def _alignment(report: RoutingReport) -> str:
    total = report.num_tokens
    rows = [
        [
            f'<th scope="row" class="text">{name}</th>',
            _cell(f"{count:,}"),
            _cell(f"{count / total:.1%}"),
            f'<td class="text">{CATEGORIES[name]}</td>',
        ]
        for name, count in report.category_counts.items()
    ]
    caption = f"Mean over heads and {report.num_shuffles} shuffles in grey, with two standard deviations."
    return (
        _figure(lambda: plot_alignment(report), "alignment-figure", caption)
        + _figure(
            lambda: plot_categories(report),
            "categories",
            "The best aligned head. Red: the category is likelier in the component than in the text.",
        )
        + _table("Surface categories of the text", ["Category", "Tokens", "Share", "Meaning"], rows, (0, 3))
    )


def _excerpt(report: RoutingReport, position: int | None) -> str:
    excerpt, (layer, head) = report.excerpt, report.best_aligned()
    route = excerpt.route(position)
    affinity = excerpt.affinity[layer.name][0, head]
    title = f"Implied attention of layer {layer.label}, head {head}"
    rows = []
    for index, (token, category) in enumerate(zip(excerpt.tokens, excerpt.categories, strict=True)):
        cells = [f'<th scope="row">{index}</th>', f'<td class="text"><code>{escape(token)}</code></td>']
        cells.append(f'<td class="text">{category}</td>')
        for gamma in excerpt.responsibilities.values():
            value, component = gamma.keys[0, min(head, gamma.keys.shape[1] - 1), index].max(dim=-1)
            cells.append(_cell(f"{component} ({value:.2f})"))
        rows.append(cells)
    labels = [f"Layer {escape(label)}" for label in excerpt.labels.values()]
    steps = []
    for step, label in enumerate(route.labels):
        found = next(item for item in report.layers if item.label == label)
        for role in ("keys", "queries"):
            if head >= len(route.components[role][step]):
                continue
            component = int(route.components[role][step][head])
            steps.append(
                [
                    f'<th scope="row" class="text">{escape(label)}</th>',
                    f'<td class="text">{"writes to" if role == "keys" else "reads from"} {component}</td>',
                    _cell(f"{route.responsibilities[role][step][head]:.2f}"),
                    f'<td class="text">{_tokens(report, found, head, component, role)}</td>',
                ]
            )
    return (
        _figure(
            lambda: plot_route(route),
            "route",
            f"Token {route.position} of the excerpt. Numbers are components; they mean something else in every head.",
        )
        + f"<details><summary>The same route in words, for head {head}</summary>"
        + _table(
            f"Route of token {route.position}, {escape(route.token)}, in head {head}",
            ["Layer", "Component", "Responsibility", "Its top tokens"],
            steps,
            (0, 1, 3),
        )
        + "</details>"
        + _figure(
            lambda: plot_affinity(affinity, excerpt.tokens, title),
            "affinity",
            "Which token reads from which: the matrix that output_attentions=True returns, every row scaled to the sum 1.",
        )
        + f"<details><summary>Where each token writes in head {head} of every layer</summary>"
        + _table(
            "Most responsible component of each key, and its responsibility",
            ["Position", "Token", "Category", *labels],
            rows,
            (1, 2),
        )
        + "</details>"
    )


def _components(report: RoutingReport) -> str:
    per_layer = max(1, MAX_HEADS // len(report.layers))
    parts = []
    shortened = False
    for layer in report.layers:
        alignment, usage = layer.keys.alignment, layer.keys.statistics.usage
        heads = sorted(alignment.nmi.argsort(descending=True)[:per_layer].tolist())
        shortened = shortened or len(heads) < len(usage)
        tables = []
        for head in heads:
            rows = [
                [
                    f'<th scope="row">{component}</th>',
                    _cell(f"{usage[head, component]:.1%}"),
                    f'<td class="text">{_tokens(report, layer, head, component, "keys")}</td>',
                ]
                for component in usage[head].argsort(descending=True)[:MAX_COMPONENTS].tolist()
            ]
            caption = (
                f"Head {head}: usage perplexity {layer.keys.statistics.usage_perplexity[head]:.1f}, entropy "
                f"{layer.keys.statistics.entropy[head]:.2f}, NMI {alignment.nmi[head]:.3f} (shuffled "
                f"{alignment.nmi_shuffled_mean[head]:.3f})"
            )
            tables.append(_table(caption, ["Component", "Usage", "Top tokens (mean responsibility)"], rows, (2,)))
        parts.append(
            f"<details><summary>Layer {escape(layer.label)}</summary>"
            f'<p class="soft"><code>{escape(layer.name)}</code></p>{"".join(tables)}</details>'
        )
    which = f"the {per_layer} best aligned heads of each layer, " if shortened else ""
    return (
        f"<p>The {MAX_COMPONENTS} most used components, by keys, {which}and the tokens that they prefer. report.json has "
        "all of them, and those of the queries.</p>" + "".join(parts)
    )


def _definitions() -> str:
    return "<dl>" + "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in DEFINITIONS.items()) + "</dl>"


def _tokens(report: RoutingReport, layer: LayerReport, head: int, component: int, role: str) -> str:
    return " ".join(
        f'<span><code>{escape(token)}</code><span class="soft">{mean:.2f}</span></span>'
        for token, _, mean in report.top_tokens(layer, head, component, role)
    )


def _figure(draw: Callable[[], Figure], identifier: str, caption: str) -> str:
    pyplot = import_pyplot()
    with pyplot.rc_context(STYLE):
        figure = draw()
        svg = inline_svg(figure, f"figure-{identifier}", caption)
    pyplot.close(figure)
    return (
        f'<figure>{SCROLL_HINT}<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _cell(value: str) -> str:
    return f"<td>{value}</td>"


def _table(
    caption: str, head: list[str], rows: list[list[str]], text_columns: tuple[int, ...], reflows: bool = False
) -> str:
    """A table that scrolls sideways on narrow screens, or whose rows become lines there."""
    headers = "".join(
        f'<th scope="col"{TEXT if index in text_columns else ""}>{title}</th>' for index, title in enumerate(head)
    )
    is_wide = len(head) > 4 and not reflows
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    return (
        f'{SCROLL_HINT if is_wide else ""}<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table{REFLOW if reflows else ''}><caption>{escape(caption)}"
        f"</caption><thead><tr>{headers}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )
