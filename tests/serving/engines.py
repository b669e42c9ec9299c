# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM engines for tests, inside the process of the test, with every slot poisoned; and what Transformers answers."""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import NamedTuple


# The engine runs in the process of the test, which can look at its slots then
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest
import torch
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from gma_hf.serving.layer import GMASlotLayer


ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 2100,
    "kv_cache_memory_bytes": 2**26,
    # Few sequences at a time and few tokens a step: requests come and go, long prompts come in chunks
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
}
# Logarithms of probabilities, after three layers in float32 whose sums are taken in another order
TOLERANCE = 1e-4
# The correlated block rounds thirty times as much as the gated one: its routes are what is left after most of them has cancelled
# With the delta rule, a rounding also changes what later tokens write; the float32 of `generate` is up to 7e-4 from float64 there
TOLERANCES = {"correlated": 1e-3, "delta": 3e-3}


@contextlib.contextmanager
def engine(folder, **options) -> Iterator[LLM]:
    """An engine whose slots nobody has written yet, which all hold NaN."""
    llm = LLM(str(folder), **{**ENGINE, **options})
    poison_slots(llm)
    try:
        yield llm
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def slot_layers(llm: LLM) -> list[GMASlotLayer]:
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, GMASlotLayer)]


def poison_slots(llm: LLM) -> None:
    for layer in slot_layers(llm):
        for tensor in layer.kv_cache:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


def make_prompts(lengths: list[int], vocab: int = 99) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]  # of the tokens


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)


def answer_of(output) -> Answer:
    tokens = list(output.outputs[0].token_ids)
    logprobs = [step[token].logprob for token, step in zip(tokens, output.outputs[0].logprobs, strict=True)]
    return Answer(tokens, logprobs)


def ask(llm: LLM, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
    """Greedy answers of vLLM to all prompts at once."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy(num_tokens), use_tqdm=False)
    return [answer_of(output) for output in outputs]


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> Answer:
    """The greedy answer of Transformers to one prompt."""
    result = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = result.sequences[0, len(prompt) :].tolist()
    logprobs = torch.stack(result.logits)[:, 0].log_softmax(-1)
    return Answer(tokens, [float(step[token]) for step, token in zip(logprobs, tokens, strict=True)])


def expect_same(answers: list[Answer], expected: list[Answer], names: list, tolerance: float = TOLERANCE) -> None:
    for answer, other, name in zip(answers, expected, names, strict=True):
        assert answer.tokens == other.tokens, name
        assert answer.logprobs == pytest.approx(other.logprobs, abs=tolerance), name
