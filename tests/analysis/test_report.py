# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The report: complete, self-contained, valid HTML; the script that writes it; what it says when it cannot."""

import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gma_hf import GMAForCausalLM, GMAForMaskedLM
from gma_hf.analysis import (
    AnalysisError,
    analyze,
    html_page,
    plot_affinity,
    plot_alignment,
    plot_categories,
    plot_entropy,
    plot_margin,
    plot_route,
    plot_stability,
    plot_usage,
    responsibilities,
    write_report,
)
from gma_hf.analysis.analyzing import layer_labels
from gma_hf.analysis.surface import token_categories
from tests.conftest import make_model, tiny_config

from .conftest import TEXT


SCRIPT = Path(__file__).parents[2] / "scripts" / "analyze_responsibilities.py"
# Figures are drawn without a window; matplotlib is imported by the tests that draw only, for it is optional
os.environ.setdefault("MPLBACKEND", "Agg")
VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def report(model, tokenizer):
    return analyze(model, tokenizer, TEXT, block_size=64, excerpt_length=60, num_shuffles=4, text_name="<a> & b")


@pytest.fixture(scope="module")
def files(report, tmp_path_factory):
    return write_report(report, tmp_path_factory.mktemp("reports") / "new" / "folder")


@pytest.fixture(scope="module")
def page(files):
    return files[0].read_text("utf-8")


class Page(HTMLParser):
    """Checks that elements are closed in order and ids unique; gathers text, links and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.elements, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def test_the_page_is_valid_and_needs_nothing_but_itself(page):
    assert page.startswith("<!DOCTYPE html>")
    parsed = Page(page)
    assert parsed.open == []
    assert len(set(parsed.ids)) == len(parsed.ids)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "base"}
    assert "http:" not in page and "https:" not in page
    for tag, attributes in parsed.elements:
        for name in ("href", "src", "xlink:href"):
            target = attributes.get(name, "#main")
            assert target.startswith("data:image/png;base64,") or target[1:] in parsed.ids, (tag, target)
    assert "url(" not in page.replace("url(#", "")


def test_the_page_can_be_used_from_the_keyboard_and_by_ear(page):
    parsed = Page(page)
    assert dict(parsed.elements)["html"]["lang"] == "en"
    first_link = next(attributes for tag, attributes in parsed.elements if tag == "a")
    assert first_link == {"class": "skip", "href": "#main"}
    levels = [int(tag[1]) for tag, _ in parsed.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    for tag, attributes in parsed.elements:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if "scroll" in attributes.get("class", ""):
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("details") == tags.count("summary") > 0
    assert tags.count("table") == tags.count("caption")
    assert "prefers-color-scheme: dark" in page and ":focus-visible" in page


def test_figures_take_the_colour_of_the_page(page):
    figures = page.split("<svg")[1:]
    assert len(figures) == 9
    for figure in figures:
        assert "currentColor" in figure
        assert "stroke: #000000" not in figure  # axes and ticks


def test_tokens_are_text_and_never_markup(page):
    parsed = Page(page)
    assert "<a> & b" in parsed.text
    assert "<script" not in page.lower()
    assert "$" in parsed.text  # and not taken for a formula


def test_the_json_file_holds_what_the_report_says(report, files):
    saved = json.loads(files[1].read_text("utf-8"))
    assert saved["format"] == "gma_hf.analysis/1"
    assert saved["text"]["num_tokens"] == sum(saved["text"]["categories"].values()) == report.num_tokens
    assert [layer["label"] for layer in saved["layers"]] == ["0", "1", "2"]
    for layer, found in zip(saved["layers"], report.layers, strict=True):
        for role in ("queries", "keys"):
            assert len(layer[role]) == 4
            for head, numbers in enumerate(layer[role]):
                statistics = getattr(found, role).statistics
                assert sum(numbers["usage"]) == pytest.approx(1)
                assert numbers["usage_perplexity"] == statistics.usage_perplexity[head]
                assert sum(numbers["margin"]["histogram"]) == report.num_tokens
                assert len(numbers["margin"]["histogram"]) + 1 == len(saved["margin_edges"])
                quantiles = list(numbers["margin"]["quantiles"].values())
                assert quantiles == sorted(quantiles)
                assert 0 <= numbers["alignment"]["nmi"] <= 1
                assert len(numbers["top_tokens"]) == 6
    excerpt = saved["excerpt"]
    assert len(excerpt["tokens"]) == len(excerpt["categories"]) == 60
    assert len(excerpt["layers"][0]["keys"]["components"][0]) == 60


def test_the_route_of_a_token_is_its_largest_responsibilities(report, model, tokenizer):
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:60]])
    found = responsibilities(model, input_ids=ids)
    route = report.excerpt.route(17)
    assert route.token == report.excerpt.tokens[17] and route.labels == ["0", "1", "2"]
    for role in ("queries", "keys"):
        for layer, gamma in enumerate(found.values()):
            values, components = getattr(gamma, role)[0, :, 17].max(dim=-1)
            assert torch.equal(route.components[role][layer], components)
            torch.testing.assert_close(route.responsibilities[role][layer], values)
    assert report.excerpt.categories[report.excerpt.route().position] in ("word", "capitalised", "function word")
    with pytest.raises(AnalysisError, match="no token 60"):
        report.excerpt.route(60)


def test_the_token_that_the_page_shows_is_a_whole_word_where_the_excerpt_ends_inside_of_a_word(model, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    categories = token_categories(tokenizer, ids)
    begins = ("word", "capitalised")
    length = next(n for n in range(59, 8, -1) if categories[n - 1] in begins and categories[n] == "continuation")
    excerpt = analyze(model, tokenizer, TEXT, excerpt_length=length, max_tokens=256).excerpt
    shown = excerpt.shown_position()
    assert len(excerpt.tokens) == length and shown < length - 1
    assert categories[shown] in begins and categories[shown + 1] != "continuation"


def test_plots_are_figures_for_notebooks(report):
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    layer = report.layers[1]
    drawn = [
        plot_usage(report),
        plot_usage(report, "queries"),
        plot_entropy(report),
        plot_margin(report),
        plot_stability(report),
        plot_alignment(report),
        plot_categories(report, layer, 2, "queries"),
        plot_route(report.excerpt.route()),
        plot_affinity(report.excerpt.affinity[layer.name][0, 2], report.excerpt.tokens),
    ]
    assert all(isinstance(figure, Figure) for figure in drawn)
    pyplot.close("all")
    with pytest.raises(ValueError, match="one head"):
        plot_affinity(report.excerpt.affinity[layer.name], report.excerpt.tokens)


@pytest.mark.quick
def test_plots_without_matplotlib_say_how_to_install_it(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_usage(report)


@pytest.mark.quick
def test_layers_have_short_names():
    decoder = [f"model.layers.{i}.self_attn.mixture_norm" for i in range(3)]
    assert list(layer_labels(decoder).values()) == ["0", "1", "2"]
    both = [f"{part}.layers.{i}.attn.gma.mixture_norm" for part in ("encoder", "decoder") for i in range(2)]
    assert list(layer_labels(both).values()) == [
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder.layers.0",
        "decoder.layers.1",
    ]
    assert layer_labels(["layers.4.mixture_norm"]) == {"layers.4.mixture_norm": "4"}
    assert layer_labels(["mixture_norm"]) == {"mixture_norm": "mixture_norm"}
    assert list(layer_labels(["a", "a.a"]).values()) != ["", ""]


def test_encoders_and_hybrids_of_any_dtype_are_analysed(tokenizer):
    for model_class, config in (
        (GMAForMaskedLM, tiny_config("gated", is_causal=False, vocab_size=len(tokenizer))),
        (GMAForCausalLM, tiny_config("hybrid", vocab_size=len(tokenizer))),
        (GMAForCausalLM, tiny_config("paper", vocab_size=len(tokenizer))),
    ):
        found = analyze(make_model(model_class, config).bfloat16(), tokenizer, TEXT[:80], num_shuffles=2)
        # Learned positions end at 160, but the text before that
        assert found.block_size == 160
        assert all(math.isfinite(layer.keys.statistics.entropy.sum()) for layer in found.layers)
    assert Page(html_page(found)).open == []


def test_the_page_says_what_entropy_and_margin_mean_for_correlated_routes(report, tokenizer):
    remark = "The layers with correlated routes read only what differs from the average component"
    config = tiny_config("correlated", vocab_size=len(tokenizer))
    correlated = analyze(make_model(GMAForCausalLM, config), tokenizer, TEXT[:80], num_shuffles=2)
    assert html_page(correlated).count(remark) == 2
    assert remark not in html_page(report)


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [SCRIPT.name, *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    return tmp_path


def test_the_script_writes_the_report_of_a_saved_model(saved, monkeypatch, capsys):
    out = saved / "out"
    options = ["--output", out, "--block_size", 64, "--num_shuffles", 2, "--token", 3, "--device", "cpu"]
    run_script(monkeypatch, saved / "model", "--text", saved / "text.txt", *options)
    assert capsys.readouterr().out.splitlines()[-2:] == [str(out / "report.html"), str(out / "report.json")]
    page, numbers = (out / "report.html").read_text("utf-8"), json.loads((out / "report.json").read_text("utf-8"))
    assert Page(page).open == [] and "Token 3 of the excerpt" in page
    assert numbers["model"] == {"name": "model", "model_type": "gma"} and numbers["text"]["name"] == "text.txt"
    assert str(saved) not in page and str(saved) not in json.dumps(numbers)
    # The numbers are those of the model that was saved, head or not
    model = AutoModelForCausalLM.from_pretrained(saved / "model")
    ids = torch.tensor([numbers_ids(saved)[:32]])
    gamma = next(iter(responsibilities(model, input_ids=ids).values())).keys[0]
    assert numbers["excerpt"]["layers"][0]["keys"]["components"] == gamma.argmax(-1).tolist()


def numbers_ids(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")(TEXT)["input_ids"]


def test_the_script_says_what_to_do_when_it_cannot(saved, monkeypatch, model, tokenizer):
    def fails(*arguments, text=saved / "text.txt"):
        with pytest.raises(SystemExit) as stop:
            run_script(monkeypatch, *arguments, "--text", text, "--output", saved / "out", "--device", "cpu")
        assert not (saved / "out").exists()
        return str(stop.value)

    empty, binary = saved / "empty.txt", saved / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00a")
    assert "There is no text in empty.txt" in fails(saved / "model", text=empty)
    assert "not UTF-8" in fails(saved / "model", text=binary)
    assert "Cannot read" in fails(saved / "model", text=saved / "missing.txt")
    assert "Cannot read" in fails(saved / "model", text=saved)
    assert "Cannot load the model" in fails(saved / "nowhere")
    assert "--block_size must be at least 1, got 0" in fails(saved / "model", "--block_size", 0)
    assert "no token 99" in fails(saved / "model", "--token", 99)
    assert "num_shuffles must be at least 2" in fails(saved / "model", "--num_shuffles", 1)

    model.save_pretrained(saved / "bare")
    assert "tokenizer_name" in fails(saved / "bare")
    small = make_model(GMAForCausalLM, tiny_config("gated", vocab_size=50))
    small.save_pretrained(saved / "small")
    assert "does not belong to the model" in fails(saved / "small", "--tokenizer_name", saved / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(saved / "llama")
    tokenizer.save_pretrained(saved / "llama")
    assert "LlamaModel has no Gaussian mixture attention" in fails(saved / "llama")


def test_nothing_of_it_is_imported_with_the_package():
    code = (
        "import sys, gma_hf; found = [m for m in sys.modules if m.startswith(('gma_hf.analysis', 'matplotlib'))]; "
        "import gma_hf.analysis; assert 'matplotlib' not in sys.modules; sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
