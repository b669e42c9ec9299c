# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM answers as `generate` does: every kind of model, alone and in a crowd, whatever happened in the slots before."""

import itertools

import pytest

from tests.serving.models import CONVERTED, NATIVE, make_model


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

from tests.serving.engines import (
    TOLERANCE,
    TOLERANCES,
    Answer,
    answer_of,
    ask,
    engine,
    expect_same,
    generate,
    greedy,
    make_prompts,
    poison_slots,
)


NUM_TOKENS = 8
# Around the borders of windows (8, 16), of the convolution (4), of chunks of a prefill (256), up to 2,000 tokens
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 18, 19, 31, 33, 64, 100, 255, 256, 257, 300, 511, 513, 1000, 2000]
# Short ones in between, so that steps mix decoding and prefill
CROWD = [*LENGTHS, 6, 11, 12, 40, 50, 60, 70]
ALONE = [1, 8, 9, 257]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """From the kind of a model to its folder and the model itself; made when first asked for."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder, model = tmp_path_factory.mktemp("model"), make_model(kind)
            model.save_pretrained(folder)
            made[kind] = folder, model
        return made[kind]

    return get


@pytest.mark.parametrize("kind", [*NATIVE, *CONVERTED])
def test_answers_equal_generate_alone_and_in_a_crowd(kind, folders):
    folder, model = folders(kind)
    tolerance = TOLERANCES.get(kind, TOLERANCE)
    prompts = make_prompts(CROWD)
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    # Answers that do not depend on the prompt would prove nothing
    assert len({tuple(answer.tokens) for answer in expected}) > len(prompts) // 2
    with engine(folder) as llm:
        alone = [CROWD.index(length) for length in ALONE]
        for index in alone:
            expect_same(ask(llm, [prompts[index]], NUM_TOKENS), [expected[index]], [CROWD[index]], tolerance)
        poison_slots(llm)
        expect_same(ask(llm, prompts, NUM_TOKENS), expected, CROWD, tolerance)


@pytest.mark.parametrize("kind", ["gated window", "llama with everything"])
def test_an_aborted_request_leaves_no_trace(kind, folders):
    """Requests stop halfway, in their prompt or their answer; others run on beside them, and take their slots."""
    folder, model = folders(kind)
    prompts = make_prompts([300, 20, 9, 33, 5, 260, 12, 7])
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    aborted_after = {"0": 1, "2": 3, "5": 7}  # steps
    with engine(folder, max_num_seqs=3) as llm:
        core, answers = llm.llm_engine, {}
        for index, prompt in enumerate(prompts):
            core.add_request(str(index), {"prompt_token_ids": prompt}, greedy(NUM_TOKENS))
        for step in itertools.count(1):
            for output in core.step():
                if output.finished:
                    answers[output.request_id] = answer_of(output)
            core.abort_request([name for name, when in aborted_after.items() if when == step])
            if not core.has_unfinished_requests():
                break
        kept = [index for index in range(len(prompts)) if str(index) not in aborted_after]
        assert sorted(map(int, answers)) == kept
        expect_same([answers[str(index)] for index in kept], [expected[index] for index in kept], kept)
        # The aborted ones again, in slots that hold what was left behind
        again = [int(name) for name in aborted_after]
        expect_same(
            ask(llm, [prompts[index] for index in again], NUM_TOKENS), [expected[index] for index in again], again
        )


def test_a_preempted_request_goes_on_as_if_nothing_had_happened(folders):
    """Where the paged cache of a hybrid's softmax layers is full, vLLM throws a request out and begins it anew."""
    folder, model = folders("hybrid")
    num_tokens = 40
    prompts = make_prompts([100, 120, 90, 110])
    expected = [generate(model, prompt, num_tokens) for prompt in prompts]
    with engine(folder, max_model_len=256, max_num_seqs=4, num_gpu_blocks_override=10, disable_log_stats=False) as llm:
        expect_same(ask(llm, prompts, num_tokens), expected, [len(prompt) for prompt in prompts])
        preempted = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preempted) > 0


def test_sampling_stops_and_logprobs_are_those_of_vllm(folders):
    """Temperature, seeds, stop tokens and the likeliest alternatives come from the logits like those of any model."""
    folder, model = folders("gated")
    prompt = make_prompts([12])[0]
    reference = generate(model, prompt, NUM_TOKENS)
    with engine(folder) as llm:
        params = greedy(NUM_TOKENS)
        params.logprobs, params.n, params.seed, params.temperature, params.max_tokens = 5, 3, 7, 1.0, 4
        first, second = (llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0] for _ in range(2))
        samples = [tuple(output.token_ids) for output in first.outputs]
        assert samples == [tuple(output.token_ids) for output in second.outputs]
        assert len(set(samples)) > 1
        # Three samples go on from three copies of the prompt's state; their likeliest first token is the same
        for output in first.outputs:
            best = max(output.logprobs[0].items(), key=lambda item: item[1].logprob)
            assert best[0] == reference.tokens[0]
            assert best[1].logprob == pytest.approx(reference.logprobs[0], abs=1e-4)
        params = greedy(NUM_TOKENS)
        params.stop_token_ids, params.ignore_eos = [reference.tokens[3]], False
        stopped: Answer = answer_of(llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0])
        assert stopped.tokens == reference.tokens[: reference.tokens.index(reference.tokens[3]) + 1]
