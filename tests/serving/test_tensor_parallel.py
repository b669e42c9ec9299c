# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM with the heads of a model spread over two processes answers as one process of Transformers does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.models import make_model


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

from tests.serving.engines import Answer, expect_same, generate, make_prompts


pytestmark = pytest.mark.timeout(900)

NUM_TOKENS = 8
# Around windows, the convolution and the chunks of a prefill; some decode while others still read their prompt
LENGTHS = [1, 9, 257, 40, 5, 600, 17]


@pytest.mark.parametrize("kind", ["hybrid", "llama with everything"])
def test_two_processes_answer_as_generate_does(kind, tmp_path):
    model, prompts = make_model(kind), make_prompts(LENGTHS)
    model.save_pretrained(tmp_path)
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    words = [
        sys.executable,
        "-m",
        "tests.serving.tensor_parallel",
        str(tmp_path),
        "2",
        str(NUM_TOKENS),
        json.dumps(prompts),
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=800, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-4000:]
    answers = [Answer(*answer) for answer in json.loads(lines[0].removeprefix("ANSWERS "))]
    expect_same(answers, expected, LENGTHS)
