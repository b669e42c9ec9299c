# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Several threads that convert models, and models that share a configuration with one that is being converted."""

import sys
import threading

import pytest
import torch
import transformers

import gma_hf
from gma_hf import convert_to_gma, revert_to_softmax
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import SIZES, make_inputs, make_softmax_model, output_of


@pytest.fixture(autouse=True)
def threads_that_alternate_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def in_threads(functions):
    """The results of functions that run at the same time; the first error, if there is one."""
    results, errors = [None] * len(functions), []
    start = threading.Barrier(len(functions))

    def work(index):
        try:
            start.wait()
            results[index] = functions[index]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_six_threads_convert_and_revert_a_model_of_their_own_each():
    tokens = make_inputs("llama")["input_ids"]
    models = [make_softmax_model("llama", seed) for seed in range(6)]
    expected = [output_of(model, input_ids=tokens) for model in models]

    def work(model):
        for _ in range(3):
            convert_to_gma(model, num_components=6, window_size=64)
            revert_to_softmax(model)
        return convert_to_gma(model, num_components=6, window_size=64)

    converted = in_threads([lambda model=model: work(model) for model in models])
    assert len({type(model) for model in converted}) == 1
    for model, softmax in zip(converted, expected, strict=True):
        # The window covers everything: softmax attention itself
        torch.testing.assert_close(output_of(model, input_ids=tokens), softmax, rtol=1e-4, atol=1e-4)


def test_a_teacher_answers_as_ever_while_a_student_with_the_same_configuration_is_converted():
    tokens = make_inputs("llama")["input_ids"]
    config = transformers.LlamaConfig(**SIZES)
    teacher, student = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    expected = output_of(teacher, input_ids=tokens)
    stop = threading.Event()

    def teach():
        outputs = []
        while not stop.is_set():
            outputs.append(output_of(teacher, input_ids=tokens))
        return outputs

    def convert():
        try:
            for _ in range(5):
                convert_to_gma(student, num_components=6)
                revert_to_softmax(student)
        finally:
            stop.set()

    outputs, _ = in_threads([teach, convert])
    assert all(torch.equal(output, expected) for output in outputs)


def test_threads_that_load_get_every_weight(tmp_path):
    """Transformers turns the tying of weights off for the whole process while it loads a model."""
    models = [
        make_model(gma_hf.GMAForCausalLM, tiny_config("gated")),
        make_model(gma_hf.GMAForCausalLM, tiny_config("windowed")),
        convert_to_gma(make_softmax_model("gpt2"), num_components=4),
        convert_to_gma(make_softmax_model("llama", tie_word_embeddings=True), num_components=4),
    ]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))

    def load(i):
        return lambda: [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i)) for _ in range(3)]

    for model, copies in zip(models, in_threads([load(i) for i in range(4)]), strict=True):
        for copy in copies:
            assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
            for name, value in model.state_dict().items():
                assert torch.equal(copy.state_dict()[name], value), name
