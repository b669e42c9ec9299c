# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Training speed of a language model on several devices: tokens a second, bytes sent, peak memory.

    torchrun --nproc_per_node=4 benchmarks/parallel/scaling.py --mode context --length 262144
    torchrun --nproc_per_node=4 benchmarks/parallel/scaling.py --mode ddp --length 4096 --rows 8
    python benchmarks/parallel/scaling.py --table --output scaling.json

12 layers of width 768 with 12 heads and 64 components, the gated preset; bfloat16 autocast, fused AdamW, gradient checkpointing
with `--checkpointing`. `--rows` is the number of rows of a step: in the mode `context` all processes share each row, in the others
the rows are spread over the processes. Strong scaling keeps rows and length while the number of processes grows, weak scaling
grows one of them with it. `--layers softmax` has softmax layers instead, which gather keys and values in the mode `context`.
"""

import argparse
import json
import os
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `benchmarks` can be imported

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.kernels import models
from benchmarks.lib.command import add_output_options, output_path, stored
from benchmarks.lib.results import Results, device_name
from benchmarks.lib.tables import markdown
from benchmarks.lib.timing import wall_time
from gma_hf import context_parallel
from gma_hf.parallel import collectives


MODES = ("one", "ddp", "fsdp2", "context")
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "context": "context parallelism"}
SIZES = {**models.SIZES, "vocab_size": 8192}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_components": 4, "vocab_size": 256}
LAYERS = {"gma": "GMA gated", "softmax": models.SOFTMAX}
WARMUP_STEPS, STEPS = 2, 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="context")
    parser.add_argument("--length", type=int, default=262144, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step, of all processes together")
    parser.add_argument("--layers", choices=LAYERS, default="gma")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see whether the benchmark runs")
    add_output_options(parser, "parallel_*")
    return parser.parse_args(argv)


class CountedBytes:
    """Counts what this process hands to the collectives of context parallelism, within the block."""

    def __enter__(self):
        self.total, self.function = 0, collectives.call_collective
        collectives.call_collective = self
        return self

    def __call__(self, function, output, *args, **kwargs):
        self.total += sum(x.nbytes for x in args if isinstance(x, torch.Tensor)) or getattr(output, "nbytes", 0)
        return self.function(function, output, *args, **kwargs)

    def __exit__(self, *error):
        collectives.call_collective = self.function


def spread(model: nn.Module, mode: str) -> nn.Module:
    """The model as all processes train it."""
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def measure(options: argparse.Namespace) -> dict:
    """A row of the results, measured by all processes."""
    rank, size, is_shared = dist.get_rank(), dist.get_world_size(), options.mode == "context"
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if options.mode == "one" and size > 1:
        raise SystemExit("error: --mode one measures one process; start one.")
    if not is_shared and options.rows % size != 0:
        raise SystemExit(
            f"error: {options.rows} rows cannot be spread over {size} processes. Choose a multiple as --rows."
        )
    sizes = {**(SMALL if options.small else SIZES), "max_position_embeddings": options.length}
    model = models.make_model(LAYERS[options.layers], sizes, device).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gradient_bytes = sum(x.nbytes for x in model.parameters())
    step_model = spread(model, options.mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0 if is_shared else rank)
    shape = (options.rows if is_shared else options.rows // size, options.length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)

    def step() -> None:
        with context_parallel() if is_shared else nullcontext() as context:
            batch = {"input_ids": tokens, "labels": tokens}
            if is_shared:
                batch = context.split(batch)
            with torch.autocast(device.type, torch.bfloat16):
                loss = step_model(**batch, use_cache=False).loss
            loss.backward()
        if is_shared:
            context.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARMUP_STEPS):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    with CountedBytes() as counted:
        for _ in range(STEPS):
            dist.barrier()
            times.append(wall_time(step))
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "tokens_per_second": options.rows * options.length / seconds,
        "gradient_bytes": gradient_bytes if size > 1 else 0,
        "sequence_bytes": counted.total / STEPS,  # of this process, activations and their gradients
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def table(content: dict) -> str:
    """A line for every measurement."""
    columns = ["mode", "layers", "processes", "rows x length", "tokens a second", "sent for sequences, MB"]
    lines = [
        [
            row["mode"], row["layers"], str(row["processes"]), f"{row['rows']} x {row['length']}",
            f"{row['tokens_per_second']:,.0f}", f"{row['sequence_bytes'] / 1e6:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        for row in content["rows"].values()
    ]  # fmt: skip
    return markdown([*columns, "peak memory, GB"], lines, left=7)


def summary(content: dict) -> str:
    """
    Tokens per second of several processes beside those of one, and beside the ideal, which is that number times the number of
    processes. One process has the same layers, the same checkpointing, and the rows of one process or the whole row.
    """
    rows = list(content["rows"].values())
    single = {(row["layers"], row["checkpointing"]): row for row in rows if row["processes"] == 1}
    lines = []
    for row in rows:
        one = single.get((row["layers"], row["checkpointing"]))
        if row["processes"] > 1 and one is not None:
            work = f"{row['rows']} x {row['length']:,}"
            speeds = one["tokens_per_second"], row["tokens_per_second"]
            share = speeds[1] / (row["processes"] * speeds[0])
            base = f"{speeds[0]:,.0f} ({one['rows']} x {one['length']:,})"
            lines.append([NAMES[row["mode"]], work, str(row["processes"]), base, f"{speeds[1]:,.0f}", f"{share:.2f}"])
    columns = ["", "rows x tokens", "GPUs", "tokens/s of one GPU (rows x tokens)", "tokens/s of all", "of the ideal"]
    return markdown(columns, lines)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.table:
        for path in stored(options):
            print(table(json.loads(path.read_text())))
        return
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        row = measure(options)
        if dist.get_rank() == 0:
            names = ("mode", "layers", "length", "rows", "checkpointing")
            key = {"mode": options.mode, "processes": dist.get_world_size(), **{n: getattr(options, n) for n in names}}
            setting = {"sizes": SMALL if options.small else SIZES, "steps": STEPS, "device": device_name()}
            results = Results(output_path(options), "training on several devices", setting)
            results.measure(key, lambda: row)
            print(table(results.report))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
