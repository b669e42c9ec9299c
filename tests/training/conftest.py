# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A small corpus, labelled texts, and a way to run the scripts as a user does, but in this process."""

import json
import random
import runpy
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


SCRIPTS = Path(__file__).parents[2] / "scripts"
WORDS = "the river runs past old mills and quiet farms while children gather stones for winter fires".split()
# Overrides that make any of the scripts' models tiny
TINY_CONFIG = (
    "hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=2,num_components=4,"
    "max_position_embeddings=64"
)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """Keep the caches of `datasets` out of the user's home; no progress bars of its own."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def sentences():
    def make(count, seed=0):
        draw = random.Random(seed)
        return [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) + "." for _ in range(count)]

    return make


@pytest.fixture
def corpus(tmp_path, sentences):
    """A plain text file of about 15,000 characters in paragraphs."""
    lines = sentences(300)
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join("\n".join(lines[i : i + 5]) for i in range(0, 300, 5)) + "\n", "utf-8")
    return path


@pytest.fixture
def labelled(tmp_path, sentences):
    """Write `name.jsonl` with texts whose first and last word tell their class."""

    def write(name, count=40, labels=("rural", "urban"), seed=0):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {
                "text": f"{labels[i % len(labels)]} {sentence} {labels[i % len(labels)]}",
                "label": labels[i % len(labels)],
            }
            for i, sentence in enumerate(sentences(count, seed))
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture
def run_script(monkeypatch):
    """Run a script in this process: `run_script("train_clm", "--train_file", ...)`."""

    def run(name, *arguments):
        # Accelerate keeps device and precision of the first run of a process
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture
def tiny_run(corpus, tmp_path):
    """Arguments of a tiny run on the corpus, as a dictionary; `command_line` turns them into a command line."""
    return {
        "train_file": str(corpus),
        "output_dir": str(tmp_path / "out"),
        "tokenizer_vocab_size": 300,
        "config_overrides": TINY_CONFIG,
        "block_size": 32,
        "validation_fraction": 0.3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def command_line(arguments, **changes):
    arguments = {**arguments, **changes}
    return [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in arguments.items()
    ]


def logged(output_dir, name="loss"):
    """The values of a metric that a run has logged, in their order."""
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def results(output_dir):
    return json.loads((Path(output_dir) / "results.json").read_text())
