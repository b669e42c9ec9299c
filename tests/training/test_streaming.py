# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Text that is read while a model trains: the same blocks as loaded text, nothing on the disk, and resumed as loaded text is."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from gma_hf.training import pack_documents, train_tokenizer
from gma_hf.training.arguments import CausalLanguageModelingArguments
from gma_hf.training.errors import TrainingInputError
from gma_hf.training.text.data import load_text_splits
from gma_hf.training.text.streaming import HELD_OUT_ROWS, stream_blocks, stream_text_splits

from .conftest import TINY_CONFIG


@pytest.fixture
def rows(tmp_path, sentences):
    """A JSON lines file with more rows than are held out, some of them empty."""
    path = tmp_path / "rows.jsonl"
    texts = [text if index % 50 else "" for index, text in enumerate(sentences(HELD_OUT_ROWS + 300))]
    path.write_text(
        "".join(json.dumps({"text": text, "id": index}) + "\n" for index, text in enumerate(texts)), "utf-8"
    )
    return path


def bytes_below(folder) -> int:
    """What a cache holds; `datasets` makes empty lock files for streams as well."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("isolate_documents", [False, True])
@pytest.mark.parametrize("kind", ["json", "text"])
def test_streamed_blocks_are_the_blocks_of_loaded_text_and_nothing_is_written(rows, corpus, kind, isolate_documents):
    path = str(rows if kind == "json" else corpus)
    arguments = CausalLanguageModelingArguments(
        train_file=[path],
        validation_file=[path],
        text_documents="paragraph",
        block_size=32,
        isolate_documents=isolate_documents,
        streaming=True,
    )
    tokenizer = train_tokenizer(["the river runs past old mills"], 300)
    before = bytes_below(datasets.config.HF_DATASETS_CACHE)
    stream = stream_blocks(stream_text_splits(arguments, max_steps=1)["train"], tokenizer, arguments)
    streamed, again = list(stream), list(stream)
    assert bytes_below(datasets.config.HF_DATASETS_CACHE) == before

    loaded = load_text_splits(arguments, seed=0)["train"]
    blocks = pack_documents(loaded, tokenizer, tokenizer.eos_token_id, 32, "train", isolate_documents).blocks
    assert len(streamed) == len(again) == len(blocks) > 20
    for name in blocks.column_names:
        assert [list(block[name]) for block in streamed] == blocks[name][:] == [list(block[name]) for block in again]


def test_without_validation_data_the_first_rows_are_held_out(rows):
    arguments = CausalLanguageModelingArguments(train_file=[str(rows)], streaming=True)
    splits = stream_text_splits(arguments, max_steps=1)
    texts = [text for line in rows.read_text("utf-8").splitlines() if (text := json.loads(line)["text"])]
    assert splits["validation"]["text"][:] == texts[:HELD_OUT_ROWS]
    assert [row["text"] for row in splits["train"]] == texts[HELD_OUT_ROWS:]


def test_what_a_stream_cannot_do_is_said_before_it_starts(rows, corpus):
    with pytest.raises(TrainingInputError, match="--max_steps"):
        stream_text_splits(CausalLanguageModelingArguments(train_file=[str(rows)], streaming=True), max_steps=-1)
    with pytest.raises(TrainingInputError, match="no text beyond the first"):
        stream_text_splits(CausalLanguageModelingArguments(train_file=[str(corpus)], streaming=True), max_steps=1)
    for column, message in (("words", "no column 'words'.*'text', 'id'"), ("id", "holds int, not text")):
        arguments = CausalLanguageModelingArguments(train_file=[str(rows)], text_column=column, streaming=True)
        with pytest.raises(TrainingInputError, match=message):
            stream_text_splits(arguments, max_steps=1)


def test_a_streamed_run_that_was_interrupted_goes_on_as_if_nothing_had_happened(
    rows, run_script, tmp_path, monkeypatch
):
    options = ["--train_file", rows, "--streaming", "--config_overrides", TINY_CONFIG, "--tokenizer_vocab_size", 300]
    options += ["--block_size", 32, "--per_device_train_batch_size", 2, "--max_steps", 4, "--save_strategy", "steps"]
    options += ["--save_steps", 2, "--report_to", "none", "--use_cpu", "--logging_steps", 1]
    run_script("train_clm", *options, "--output_dir", tmp_path / "whole")

    from gma_hf.training.trainer import GMATrainer

    step = GMATrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GMATrainer, "training_step", interrupted)
        with pytest.raises(SystemExit):
            run_script("train_clm", *options, "--output_dir", tmp_path / "halves")
    run_script("train_clm", *options, "--output_dir", tmp_path / "halves")

    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=0, atol=0)
    results = json.loads((tmp_path / "whole" / "results.json").read_text("utf-8"))
    assert results["data"]["train_tokens"] == 4 * 2 * 32
