# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors of several devices, meta beside real ones above all, are refused by every operator; memory that nobody wrote never comes back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gma_hf import GMAForCausalLM, GMAForMaskedLM
from gma_hf.ops import gaussian_mixture_affinity, gaussian_mixture_attention, gaussian_mixture_responsibilities
from tests.conftest import make_model, tiny_config

from .problems import MIXTURE, Problem


EVERYTHING = {"weights": True, "decay": True, "state": True}
CALLS = {
    "causal": {},
    "one token": {"length": 1, **EVERYTHING},
    "everything": EVERYTHING,
    "bidirectional": {"causal": False, "weights": True, "state": True},
    "packed bidirectional": {"causal": False, "packed": True},
}
NAMES = {"S": "initial_state S", "z": "initial_state z"}


@pytest.mark.parametrize("case", CALLS)
def test_the_public_function_names_the_tensor_without_values(case):
    problem = Problem(**CALLS[case])
    tensors = problem.tensors()
    for name in tensors:
        with pytest.raises(ValueError, match=f"Load the values of {NAMES.get(name, name)} first"):
            problem.run(tensors | {name: tensors[name].to("meta")})
    with pytest.raises(ValueError, match=r"means is on meta, but query is on cpu"):
        problem.run(tensors | {name: tensors[name].to("meta") for name in MIXTURE})
    if problem.packed:
        return  # whose ids have values
    for x in problem.run({name: x.to("meta") for name, x in tensors.items()}).values():
        assert x.is_meta


def test_affinity_and_responsibilities_name_it_too():
    tensors = Problem().tensors()
    mixture = [tensors["means"].to("meta"), tensors["raw_variances"], tensors["prior_logits"]]
    with pytest.raises(ValueError, match="Load the values of means first"):
        gaussian_mixture_affinity(tensors["query"], tensors["key"], *mixture)
    with pytest.raises(ValueError, match="Load the values of means first"):
        gaussian_mixture_responsibilities(tensors["query"], *mixture)


class Recorder(TorchDispatchMode):
    """Keeps one call of every operator of the package."""

    def __init__(self):
        super().__init__()
        self.calls: dict = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gma_hf":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


def recorded_calls() -> dict:
    """What models of every kind call in training."""
    with Recorder() as recorder:
        tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
        for block in ("paper", "gated", "windowed"):
            make_model(GMAForCausalLM, tiny_config(block))(tokens, labels=tokens).loss.backward()
        encoder = make_model(GMAForMaskedLM, tiny_config("gated", is_causal=False, use_decay=False))
        encoder(tokens, labels=tokens).loss.backward()
        state = Problem(causal=False, weights=True, state=True)
        state.results(torch.float32)
    return recorder.calls


def test_every_operator_refuses_what_has_no_values(monkeypatch):
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    calls = recorded_calls()
    names = {function._schema.name.split("::")[1] for function in calls}
    assert names == {
        "chunked_causal", "chunked_causal_backward", "write_state", "write_state_backward", "read_state",
        "read_state_backward", "window_softmax", "window_softmax_backward",
    }  # fmt: skip
    for function, arguments in calls.items():
        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                replaced = argument.to("meta")
            elif isinstance(argument, list | tuple) and argument and isinstance(argument[0], torch.Tensor):
                replaced = [argument[0].to("meta"), *argument[1:]]
            else:
                continue
            with pytest.raises(ValueError, match="meta"):
                function(*arguments[:i], replaced, *arguments[i + 1 :])


def test_compilation_still_knows_the_shapes():
    """Fake tensors of one device pass: what a compiler asks the fake implementations for."""
    for function, arguments in recorded_calls().items():
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))
    assert gaussian_mixture_attention(**Problem().tensors()).isfinite().all()
