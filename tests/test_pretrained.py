# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The weights in the repository load, write text, and are what their card says."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

import gma_hf


ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "pretrained" / "gma-wikipedia-7m"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((FOLDER / "measured.json").read_text(encoding="utf-8"))
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "repetition_penalty": 1.2}
WITHOUT_IMPORT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
written = model.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(type(model).__name__, written[0].tolist())
"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def test_auto_classes_load_it_and_it_writes_words(model, tokenizer):
    assert isinstance(model, gma_hf.GMAForCausalLM) and model.dtype == torch.bfloat16 and not model.training
    inputs = tokenizer("The history of the village", return_tensors="pt")
    set_seed(0)
    written = tokenizer.decode(model.generate(**inputs, max_new_tokens=40, **SAMPLING)[0])
    assert written.startswith("The history of the village") and len(written.split()) > 15
    # A model that learnt nothing writes fragments of words; English prose has these words all over
    assert len({"the", "of", "and", "in", "a", "was", "is", "to"} & set(written.split())) >= 4


def test_programs_without_import_load_it_and_write_the_same(model, tokenizer):
    command = [sys.executable, "-c", WITHOUT_IMPORT, str(FOLDER)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    inputs = tokenizer("The river", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    assert result.stdout.split("\n")[0] == f"GMAForCausalLM {written}"


def test_the_pipeline_continues_prompts(model, tokenizer):
    generator = pipeline("text-generation", model=str(FOLDER), batch_size=2)
    prompts = ["The city", "In the nineteenth century, the railway"]
    results = generator(prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert [result[0]["generated_text"].startswith(prompt) for result, prompt in zip(results, prompts, strict=True)]
    for result, prompt in zip(results, prompts, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert result[0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)


def test_one_file_of_weights_below_16_megabytes_in_bfloat16():
    assert [path.name for path in FOLDER.glob("*.safetensors")] == ["model.safetensors"]
    assert (FOLDER / "model.safetensors").stat().st_size < 16e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}


def test_english_that_it_never_saw_is_likely_to_it(tokenizer):
    """
    The texts of the card are not in the repository. The licence is English prose on another subject: harder than encyclopedic
    prose, far easier than for a model that knows the frequencies of tokens alone, which is near 1,000.
    """
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, : MEASURED["context"]]
    with torch.no_grad():
        reached = math.exp(model(tokens, labels=tokens).loss)
        mixed = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
        without_order = math.exp(model(mixed, labels=mixed).loss)
    assert MEASURED["wikipedia_valid_perplexity"] / 3 < reached < 4 * MEASURED["wikipedia_valid_perplexity"]
    assert reached < without_order / 5


def test_the_card_quotes_what_was_measured(model):
    assert model.num_parameters() == MEASURED["parameters"]
    for name in ("parameters", "steps", "tokens", "tokens_per_step", "tokens_per_second", "context"):
        assert f"{MEASURED[name]:,}" in CARD, name
    assert MEASURED["command"] in CARD and MEASURED["device"] in CARD
    table = dict(re.findall(r"^\| (\w.+?) \| (.+) \|$", CARD, flags=re.MULTILINE))

    def quoted(name: str) -> str:
        low, high = MEASURED[f"{name}_interval"]
        return f"{MEASURED[name]:.1f} [{low:.1f}, {high:.1f}]"

    for split, word in (("valid", "validation"), ("test", "test")):
        for label, suffix in (("as published", ""), ("tokenisation undone", "_detokenized")):
            name = f"wikitext_{split}{suffix}"
            expected = f"{quoted(f'{name}_perplexity')} | {quoted(f'{name}_word_perplexity')}"
            assert table[f"WikiText-103 {word}, {label}"] == expected
    assert table["held-out Wikipedia articles"].startswith(quoted("wikipedia_valid_perplexity"))


def test_the_metadata_of_the_card_quotes_what_was_measured():
    metadata = yaml.safe_load(CARD.split("---\n")[1])
    values = [metric["value"] for result in metadata["model-index"][0]["results"] for metric in result["metrics"]]
    assert len(values) == 9 and set(values) <= set(filter(lambda x: isinstance(x, float), MEASURED.values()))


def test_the_example_of_the_card_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", CARD, flags=re.DOTALL)
    exec(compile(example, "card", "exec"), {"__name__": "card"})
    assert capsys.readouterr().out.startswith("The history of the village")


def test_distributions_leave_it_out():
    builds = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.hatch.build.targets.")
    (wheel,), (source,) = ([part for part in builds if part.startswith(name)] for name in ("wheel]", "sdist]"))
    assert 'only-include = ["gma_hf", "gma_hf_command.py"]' in wheel
    assert 'exclude = ["/pretrained"]' in source
