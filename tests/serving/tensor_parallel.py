# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Greedy answers of a model whose heads are spread over processes: a program of its own, because vLLM starts its processes by importing
the main module again.

    python -m tests.serving.tensor_parallel FOLDER PROCESSES NUM_TOKENS "[[3, 4], [5]]"
"""

import json
import os
import sys


def main() -> None:
    folder, processes, num_tokens, prompts = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself vLLM wants a NUMA node for each process
    from vllm import LLM

    from tests.serving.engines import ENGINE, ask

    options = {**ENGINE, "tensor_parallel_size": int(processes), "distributed_executor_backend": "mp"}
    answers = ask(LLM(folder, **options), json.loads(prompts), int(num_tokens))
    print("ANSWERS", json.dumps(answers))


if __name__ == "__main__":
    main()
