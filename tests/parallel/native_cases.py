"""Run by several processes, see `test_context_parallel.py`: each case compares the parts of a sequence with the whole."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMACacheLayer, MemoryState
from gma_hf.parallel import ContextParallel
from gma_hf.parallel.batches import split_batch
from tests.conftest import BLOCKS, make_model, tiny_config
from tests.parallel.running import Case


# Sums of float32 in another order, through three layers
TOLERANCE = {"rtol": 1e-4, "atol": 3e-5}
LENGTH = 23  # neither two nor four divide it
KINDS = {
    **{block: {} for block in BLOCKS if block != "delta"},  # which is refused
    "long window": {
        "block": "windowed",
        "window_size": 9,
        "num_sink_tokens": 3,
    },  # longer than the parts of four processes
    "window of one": {"block": "windowed", "window_size": 1, "num_sink_tokens": 0},
    "learned positions": {"block": "paper", "position_embedding_type": "learned"},
    "window of a hybrid": {"block": "hybrid", "window_size": 3, "num_sink_tokens": 1, "conv_kernel_size": 7},
}


def rows(name: str) -> dict[str, torch.Tensor]:
    """Batches of two rows, told apart by what is hard about them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 99, (2, LENGTH), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    mask = torch.ones_like(tokens)
    if name == "padded left":
        mask[0, :13] = 0
        mask[1, :2] = 0
    elif name == "padded right":
        mask[0, 8:] = 0
    elif name == "padded anywhere":
        mask = (torch.rand(mask.shape, generator=generator) > 0.4).long()
        mask[0, 5:12] = 0
    if name.startswith("padded"):
        batch["attention_mask"] = mask
        batch["labels"] = tokens.masked_fill(mask == 0, -100)
    if name in ("packed", "packed and padded"):
        # Borders between processes: 12 for two, 6, 12 and 18 for four
        borders = {"packed": [[4, 15], [12]], "packed and padded": [[6, 7], [2, 3, 4, 20]]}[name]
        ids = torch.zeros_like(tokens)
        for row, starts in enumerate(borders):
            for start in starts:
                ids[row, start:] += 1
        batch["seq_idx"] = ids
        if name == "packed and padded":
            mask[0, 9:14] = 0
            mask[1, -2:] = 0
            batch["attention_mask"] = mask
            batch["labels"] = tokens.masked_fill(mask == 0, -100)
    if name == "packed by positions":
        starts = [0, 5, 12, 13, 21]
        batch["position_ids"] = torch.cat(
            [torch.arange(b - a) for a, b in zip(starts, [*starts[1:], LENGTH], strict=True)]
        )[None].expand(2, -1)
    return batch


ROWS = (
    "plain",
    "padded left",
    "padded right",
    "padded anywhere",
    "packed",
    "packed and padded",
    "packed by positions",
)


def model_of(kind: str):
    options = dict(KINDS[kind])
    return make_model(gma_hf.GMAForCausalLM, tiny_config(options.pop("block", kind), **options))


def compare(model, batch: dict[str, torch.Tensor], shift_labels: bool = True, tolerance=TOLERANCE) -> None:
    """Logits, loss and every gradient of the whole in one process, and of the parts together."""
    single = copy.deepcopy(model)
    expected = single(**batch, use_cache=False) if shift_labels else single(**batch)
    expected.loss.backward()
    with gma_hf.context_parallel() as context:
        part = split_batch(context, batch, shift_labels=shift_labels)
        outputs = model(**part, use_cache=False) if shift_labels else model(**part)
        outputs.loss.backward()
    logits = context.gather(outputs.logits)
    is_real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(logits[is_real], expected.logits.detach()[is_real], **tolerance)
    torch.testing.assert_close(context.total(outputs.loss), expected.loss.detach(), **tolerance)
    context.sum_gradients(model)
    for name, parameter in single.named_parameters():
        gradient = model.get_parameter(name).grad
        if parameter.grad is None:
            assert not gradient.any(), name
            continue
        scale = parameter.grad.abs().max()
        error = (gradient - parameter.grad).abs().max()
        assert error <= 1e-3 * scale + 1e-6, f"{name}: {error} of {scale}"


def native(kind: str, row: str):
    return lambda: compare(model_of(kind), rows(row))


def prefills(kind: str, row: str) -> None:
    """A prompt that the processes read together is gone on from as one that was read by one process."""
    model, batch = model_of(kind), rows(row)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    context = ContextParallel()
    cache = context.prefill(model, **inputs)
    whole = {name: value[:, :-1] for name, value in inputs.items()}
    with torch.no_grad():
        expected = model(**whole, use_cache=True)[CACHE_NAME]
    assert cache.get_seq_length() == expected.get_seq_length() == LENGTH - 1
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        if not isinstance(layer, GMACacheLayer):
            torch.testing.assert_close(layer.keys, other.keys, **TOLERANCE)
            continue
        for name, x, y in zip(MemoryState._fields, layer.history, other.history, strict=True):
            if isinstance(y, torch.Tensor) and isinstance(x, torch.Tensor):
                torch.testing.assert_close(x, y, **TOLERANCE, msg=lambda message, name=name: f"{name}: {message}")
    arguments = {"max_new_tokens": 6, "do_sample": False}
    continued = model.generate(**inputs, **{CACHE_NAME: cache}, **arguments)
    assert torch.equal(continued, model.generate(**inputs, **arguments))


def checkpoints_gradients() -> None:
    model = model_of("windowed").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(model, rows("packed and padded"))


def uneven_parts() -> None:
    """A caller may cut a sequence anywhere."""
    model, tokens = model_of("long window"), rows("plain")["input_ids"]
    with torch.no_grad():
        expected = model(tokens).logits
        with gma_hf.context_parallel() as context:
            bounds = [0, *[1, 20, 21][: context.size - 1], LENGTH]
            logits = model(tokens[:, bounds[context.rank] : bounds[context.rank + 1]], use_cache=False).logits
            torch.testing.assert_close(context.gather(logits), expected, **TOLERANCE)


def nothing_outside() -> None:
    """After the context, and in other threads, a model computes alone."""
    model, tokens = model_of("gated"), rows("plain")["input_ids"]
    with torch.no_grad():
        expected = model(tokens).logits
        with gma_hf.context_parallel():
            with ThreadPoolExecutor(1) as threads:
                assert torch.equal(threads.submit(lambda: model(tokens).logits.detach()).result(), expected)
        assert torch.equal(model(tokens).logits, expected)


def refuses(message: str, call) -> None:
    with gma_hf.context_parallel() as context, pytest.raises(ValueError, match=message):
        call(context)


def bad_input() -> None:
    model, tokens = model_of("gated"), rows("plain")["input_ids"]
    rank = torch.distributed.get_rank()
    refuses("cannot be cut into", lambda context: context.split({"input_ids": tokens[:, :1]}))
    refuses("given different batches", lambda context: context.split({"input_ids": tokens + (rank == 1)}))
    swapped = {"input_ids": tokens if rank == 0 else tokens.flip(0), "labels": tokens}
    refuses("given different batches", lambda context: context.split(swapped))
    refuses(
        "cannot be cut with them",
        lambda context: context.split({"input_ids": tokens, "attention_mask": tokens[:, 1:]}),
    )
    refuses("label for every token", lambda context: context.split({"input_ids": tokens, "labels": tokens[:, 0]}))
    refuses(
        "does not know how to cut `pixels`", lambda context: context.split({"input_ids": tokens, "pixels": tokens})
    )
    refuses("needs `input_ids`", lambda context: context.split({"labels": tokens}))
    refuses(
        "every process needs at least one",
        lambda context: model(tokens[:, : 3 * rank]),
    )
    refuses("given different inputs: rows", lambda context: model(tokens[: 1 + (rank == 0)]))
    refuses("`output_attentions=True` needs all tokens", lambda context: model(tokens, output_attentions=True))
    cache = model(tokens)[CACHE_NAME]
    refuses("Leave `context_parallel` to continue", lambda context: model(tokens, **{CACHE_NAME: cache}))
    refuses("Cut them with the whole batch", lambda context: model(tokens, labels=tokens))
    refuses("Pass their number", lambda context: model(tokens, labels=tokens, shift_labels=tokens))
    classifier = make_model(gma_hf.GMAForSequenceClassification, tiny_config("gated"))
    refuses("one output of a whole sequence", lambda context: classifier(tokens))


def bidirectional(kind: str, row: str) -> None:
    options = dict(KINDS[kind])
    config = tiny_config(options.pop("block", kind), **{**options, "is_causal": False})
    compare(make_model(gma_hf.GMAForMaskedLM, config), rows(row), shift_labels=False)


SOME = ("plain", "packed and padded")
HARD = ("windowed", "long window", "gated")
CASES = [Case(f"{kind}, {row}", native(kind, row)) for kind in KINDS for row in ROWS if kind in HARD or row in SOME]
CASES += [
    Case(f"to both sides: {kind}, {row}", partial(bidirectional, kind, row))
    for kind in ("paper-rope", "paper", "hybrid", "long window")
    for row in (ROWS if kind == "long window" else ("plain", "packed and padded"))
]
CASES += [
    Case(f"prefill: {kind}, {row}", partial(prefills, kind, row))
    for kind in ("hybrid", "long window")
    for row in ROWS[:2]
]
CASES += [
    Case("gradient checkpointing", checkpoints_gradients),
    Case("uneven parts", uneven_parts),
    Case("nothing outside of the context", nothing_outside),
    Case("bad input", bad_input),
]
