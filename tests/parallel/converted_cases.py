"""Converted models, see `native_cases.py`."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.conversion.runtime.parts import IMPLEMENTATION
from gma_hf.parallel import ContextParallel
from tests.conversion.tiny_models import make_converted_model
from tests.parallel.native_cases import LENGTH, compare, rows
from tests.parallel.running import Case


KINDS = {
    "llama": {"window_size": 0},
    "llama that forgets, with routing maps": {
        "window_size": 0,
        "use_forgetting": True,
        "use_routing_projections": True,
    },
    "llama with a window": {"window_size": 4, "num_sink_tokens": 2},
    "llama with a long window": {"window_size": 9, "num_sink_tokens": 3, "use_forgetting": True},
    "llama with a softmax layer": {"window_size": 3, "layers": [1]},
    "mistral with a softmax layer": {"window_size": 0, "layers": [1]},
}
# These sum what converted layers make of weights three times as large as usual
TOLERANCE = {"rtol": 1e-3, "atol": 3e-4}


def model_of(kind: str):
    model = make_converted_model(kind.split()[0], **KINDS[kind])
    if "softmax" in kind:
        model.set_attn_implementation(IMPLEMENTATION)
    return model


def agrees(kind: str, row: str) -> None:
    compare(model_of(kind), rows(row), tolerance=TOLERANCE)


def few_labels() -> None:
    """Only the first process has labels."""
    batch = rows("plain")
    batch["labels"][:, 4:] = -100
    compare(model_of("llama"), batch, tolerance=TOLERANCE)


def prefills(kind: str) -> None:
    model, inputs = model_of(kind), {"input_ids": rows("plain")["input_ids"]}
    cache = ContextParallel().prefill(model, **inputs)
    assert cache.get_seq_length() == LENGTH - 1
    arguments = {"max_new_tokens": 6, "do_sample": False}
    continued = model.generate(**inputs, **{CACHE_NAME: cache}, **arguments)
    assert torch.equal(continued, model.generate(**inputs, **arguments))


def encodes(window: int, row: str) -> None:
    model = make_converted_model("bert", window_size=window)
    batch = rows(row)
    batch["position_ids"] = torch.arange(LENGTH)[None]
    compare(model, batch, shift_labels=False, tolerance=TOLERANCE)


def bad_input() -> None:
    tokens = rows("plain")["input_ids"]
    with gma_hf.context_parallel():
        with pytest.raises(ValueError, match="set_attn_implementation"):
            make_converted_model("llama", layers=[1])(tokens)
        with pytest.raises(ValueError, match="Pass `position_ids` of whole rows"):
            make_converted_model("gpt2")(tokens)
        with pytest.raises(ValueError, match="a 2D attention mask"):
            make_converted_model("llama")(tokens, attention_mask=torch.ones(2, 1, LENGTH, LENGTH).bool().tril())
        with pytest.raises(ValueError, match=r"use_cache=False|context.prefill"):
            model_of("llama with a softmax layer")(tokens, **{CACHE_NAME: DynamicCache()})


ROWS = ("plain", "padded anywhere", "packed and padded")
CASES = [Case(f"{kind}, {row}", partial(agrees, kind, row)) for kind in KINDS for row in ROWS]
CASES += [Case(f"bert with a window of {size}, {row}", partial(encodes, size, row)) for size in (0, 4) for row in ROWS]
CASES += [
    Case(f"prefill: {kind}", partial(prefills, kind)) for kind in ("llama with a window", "llama with a softmax layer")
]
CASES += [Case("labels in one part", few_labels), Case("bad input of converted models", bad_input)]
