# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors of several devices, meta beside real ones above all, are refused by every operator; memory that nobody wrote never comes back."""

import importlib
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gma_hf.ops
from gma_hf import GMAForCausalLM, GMAForMaskedLM
from gma_hf.ops import (
    gaussian_mixture_affinity,
    gaussian_mixture_attention,
    gaussian_mixture_attention_in_slots,
    gaussian_mixture_responsibilities,
)
from gma_hf.ops.triton_support import INSTALLED
from tests.conftest import make_model, tiny_config

from .kernels import DEVICE
from .problems import MIXTURE, Problem


EVERYTHING = {"weights": True, "decay": True, "state": True}
CALLS = {
    "causal": {},
    "one token": {"length": 1, **EVERYTHING},
    "everything": EVERYTHING,
    "delta rule": {**EVERYTHING, "delta": True},
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


def registered_operators() -> set[str]:
    """The names of all operators that the package has told PyTorch of, whichever file they are in."""
    for module in pkgutil.walk_packages(gma_hf.ops.__path__, "gma_hf.ops."):
        importlib.import_module(module.name)
    prefix = "gma_hf::"
    names = (name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names())
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def recorded_calls(monkeypatch) -> dict:
    """What models of every kind call in training and in generation, in plain PyTorch and with every kernel."""
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    with Recorder() as recorder:
        for block in ("paper", "gated", "windowed", "delta"):
            make_model(GMAForCausalLM, tiny_config(block))(tokens, labels=tokens).loss.backward()
        encoder = make_model(GMAForMaskedLM, tiny_config("gated", is_causal=False, use_decay=False))
        encoder(tokens, labels=tokens).loss.backward()
        state = Problem(causal=False, weights=True, state=True)
        state.results(torch.float32)
    if INSTALLED and DEVICE == "cpu":
        from gma_hf.ops.rotation.triton.kernels import turn_back

        monkeypatch.setenv("GMA_HF_BACKEND", "triton")
        with Recorder() as with_kernels:
            model = make_model(GMAForCausalLM, tiny_config("gated", num_hidden_layers=1))
            model(tokens, labels=tokens).loss.backward()
            model.generate(tokens, max_new_tokens=2)
            turn_back(torch.ones(1, 2, 3, 4), torch.ones(1, 3, 2), torch.zeros(1, 3, 2), 4)
            step = {name: x.float() for name, x in Problem(length=1).tensors().items()}
            states = torch.zeros(4, 1, 5, 3), torch.zeros(4, 1, 5)
            gaussian_mixture_attention_in_slots(**step, states=states, slots=torch.tensor([2, 0]))
            row = {name: x.float() for name, x in Problem(length=5, batch=1).tensors().items()}
            slots = torch.tensor([2, 0])
            gaussian_mixture_attention_in_slots(**row, sequence_lengths=[3, 2], states=states, slots=slots)
        monkeypatch.delenv("GMA_HF_BACKEND")
        return recorder.calls | with_kernels.calls
    return recorder.calls


def test_every_operator_refuses_what_has_no_values(monkeypatch):
    calls = recorded_calls(monkeypatch)
    if INSTALLED and DEVICE == "cpu":
        assert {function._schema.name.split("::")[1] for function in calls} == registered_operators()
    for function, arguments in calls.items():
        replaced = 0
        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                changed = argument.to("meta")
            elif isinstance(argument, list | tuple) and argument and isinstance(argument[0], torch.Tensor):
                changed = [argument[0].to("meta"), *argument[1:]]
            else:
                continue
            replaced += 1
            with pytest.raises(ValueError, match=r"meta.*Load the values of"):
                function(*arguments[:i], changed, *arguments[i + 1 :])
        assert replaced > 1, function


def test_compilation_still_knows_the_shapes(monkeypatch):
    """Fake tensors of one device pass: what a compiler asks the fake implementations for."""
    for function, arguments in recorded_calls(monkeypatch).items():
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))
    assert gaussian_mixture_attention(**Problem().tensors()).isfinite().all()
