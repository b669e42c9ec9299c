# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM's server, a process of its own with no option that names gma_hf, asked over HTTP by the OpenAI client."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.kernels.serving_load import LARGEST_GROWTH, Server, measure_load
from tests.serving.models import make_model


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

from openai import OpenAI


pytestmark = pytest.mark.timeout(900)

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
STREAMS, SECONDS = 64, 60


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; the tiny models know 99 of them, those of ASCII text from the blank on."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "Ġ", "Ċ", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("gated window").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    running = Server(folder, tmp_path_factory.mktemp("log") / "server.txt", STREAMS)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


@torch.no_grad()
def continuation(folder: Path, text: str, num_tokens: int) -> str:
    """What Transformers answers, by the folder alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(inputs["input_ids"], max_new_tokens=num_tokens, do_sample=False)[0]
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_completions_equal_generate(server, client):
    prompt = "Once upon a time there was a mixture of Gaussians."
    answer = client.completions.create(
        model=str(server.folder), prompt=prompt, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].text == continuation(server.folder, prompt, 20)


def test_chat_and_streaming_equal_generate(server, client):
    messages = [{"role": "user", "content": "Which component wrote this?"}]
    expected = continuation(server.folder, "user: Which component wrote this?\n", 20)
    options = {
        "model": str(server.folder),
        "messages": messages,
        "max_tokens": 20,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    assert client.chat.completions.create(**options).choices[0].message.content == expected
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == expected
    assert sum(piece != "" for piece in pieces) > 5


def test_a_prompt_beyond_the_context_is_refused_and_the_server_goes_on(server, client):
    import openai

    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model=str(server.folder), prompt="a" * 1500, max_tokens=4)
    assert client.completions.create(model=str(server.folder), prompt="a", max_tokens=4).usage.completion_tokens > 0


def test_memory_is_flat_under_a_load_of_many_streams(server, record_property, capsys):
    """What the streams cost does not grow with what they have said, and clients that go away leave nothing behind."""
    report = measure_load(server, STREAMS, SECONDS)
    with capsys.disabled():
        print(f"\n{STREAMS} streams for {SECONDS} seconds:", report)
    for name, value in report.items():
        record_property(name, value)
    assert report["tokens_per_second"] * SECONDS > STREAMS
    assert report["left_answers"] > 0
    assert report["growth"] < LARGEST_GROWTH
