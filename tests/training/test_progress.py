# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What a command prints while it trains: where it is, how long it still takes, and numbers that read as numbers."""

import re

import pytest

from gma_hf.commands.shared.progress import clock, readable

from .conftest import TINY_CONFIG


@pytest.mark.parametrize("with_bar", [True, False])
def test_a_run_says_its_step_the_time_left_and_its_loss(with_bar, corpus, run_script, tmp_path, capfd):
    options = ["--train_file", corpus, "--config_overrides", TINY_CONFIG, "--tokenizer_vocab_size", 300]
    options += ["--block_size", 32, "--max_steps", 4, "--report_to", "none", "--use_cpu", "--logging_steps", 2]
    options += ["--disable_tqdm", not with_bar, "--eval_strategy", "no", "--output_dir", tmp_path / "run"]
    run_script("train_clm", *options)
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert re.match(
        r"step 2 of 4, \d+:\d\d left: loss \d\.\d+, grad norm \d\S*, learning rate \d\S*, epoch \d", lines[0]
    )
    assert re.match(r"step 4 of 4: loss \d", lines[1])
    assert "{'" not in captured.out and ("2/4" in captured.err) == with_bar


def test_numbers_have_four_digits_and_names_are_words():
    logs = {"eval_loss": 5.4321987, "mixture/dead_components": 3, "total_flos": 1e12}
    assert readable(logs) == "eval loss 5.432, mixture dead components 3"


@pytest.mark.parametrize("seconds, shown", [(0.4, "0:00"), (129.6, "2:10"), (3599.9, "1:00:00"), (7325, "2:02:05")])
def test_the_time_that_is_left_reads_as_a_clock(seconds, shown):
    assert clock(seconds) == shown
