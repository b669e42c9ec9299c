# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What a caller is told when arguments do not fit, how backends are chosen, and that calls compile."""

import logging
import math

import pytest
import torch

from gma_hf.ops import (
    available_backends,
    dispatch,
    gaussian_mixture_affinity,
    gaussian_mixture_attention,
    gaussian_mixture_responsibilities,
)
from gma_hf.ops.attention.call import WAYS
from gma_hf.ops.attention.chunked.blocks import causal_blocks, state_slots
from gma_hf.ops.dispatch import Way, Ways

from .problems import Problem, assert_close


def call(**changes):
    return gaussian_mixture_attention(**(Problem(batch=2, key_heads=2, length=20).tensors() | changes))


WRONG = {
    "no tensor": ({"means": None}, "means is NoneType, expected a tensor"),
    "causal": ({"causal": "no"}, "causal is 'no', expected True or False"),
    "normalize": ({"normalize": 1}, "normalize is 1, expected True or False"),
    "eps": ({"eps": -1.0}, "eps is -1.0, expected a finite number that is not negative"),
    "eps nan": ({"eps": math.nan}, "eps is nan"),
    "eps inf": ({"eps": math.inf}, "eps is inf"),
    "eps text": ({"eps": "small"}, "eps is 'small', expected a number"),
    "floor": ({"variance_floor": -5}, "variance_floor is -5, expected a finite number"),
    "floor nan": ({"variance_floor": math.nan}, "variance_floor is nan"),
    "one component": (
        {
            "correlate": True,
            "normalize": False,
            "means": torch.zeros(2, 1, 4),
            "raw_variances": torch.zeros(2, 1, 4),
            "prior_logits": torch.zeros(2, 1),
        },
        "correlate is given with one component.*use 2 or more",
    ),
    "correlation": ({"correlate": True}, "correlate is given with normalize=True.*use normalize=False"),
    "mixture of integers": (
        {"prior_logits": torch.zeros(2, 5, dtype=torch.long)},
        "prior_logits has dtype torch.int64",
    ),
    "query": ({"query": torch.zeros(2, 2, 20)}, r"query has shape \[2, 2, 20\]"),
    "integers": ({"query": torch.zeros(2, 2, 20, 4, dtype=torch.long)}, "query has dtype torch.int64"),
    "key": ({"key": torch.zeros(2, 2, 20, 5)}, r"key has shape .* = \[2, 2, 20, 4\]"),
    "value": ({"value": torch.zeros(2, 2, 19, 3)}, r"value has shape .* = \[2, 2, 20, 3\]"),
    "heads": ({"query": torch.zeros(2, 3, 20, 4)}, "query has 3 heads, means 2 mixtures"),
    "means": ({"means": torch.zeros(2, 5, 3)}, "means has shape .*routing_dim = 4"),
    "variances": ({"raw_variances": torch.zeros(2, 4, 4)}, r"raw_variances has shape .* = \[2, 5, 4\]"),
    "priors": ({"prior_logits": torch.zeros(2, 4)}, r"prior_logits has shape .* = \[2, 5\]"),
    "weight": ({"write_weight": torch.ones(2, 20)}, r"write_weight has shape \[2, 20\]"),
    "weight length": ({"write_weight": torch.ones(2, 1, 19)}, r"write_weight has shape .* = \[2, 1, 20\]"),
    "decay heads": ({"log_decay": torch.zeros(2, 3, 20)}, "log_decay has shape .* dividing the 2"),
    "decay direction": ({"log_decay": torch.zeros(2, 2, 20), "causal": False}, "log_decay .* causal=True"),
    "ids shape": ({"sequence_ids": torch.zeros(20, dtype=torch.long)}, r"sequence_ids has shape \[20\]"),
    "ids dtype": ({"sequence_ids": torch.zeros(2, 20)}, "sequence_ids has dtype torch.float32, expected integers"),
    "ids state": (
        {"sequence_ids": torch.zeros(2, 20, dtype=torch.long), "causal": False, "output_final_state": True},
        "a state of its own",
    ),
    "lengths": ({"query": torch.zeros(2, 2, 7, 4)}, "query length 7 and key length 20"),
    "state": ({"initial_state": (torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 5))}, "initial_state S has shape"),
    "state z": ({"initial_state": (torch.zeros(2, 2, 5, 3), torch.zeros(2, 2))}, "initial_state z has shape"),
    "state that is no pair": (
        {"initial_state": torch.zeros(2, 2, 5, 3)},
        "initial_state is Tensor, expected the pair",
    ),
    "state without z": ({"initial_state": (torch.zeros(2, 2, 5, 3), None)}, "z of initial_state is NoneType"),
    "state parts": ({"initial_state": (torch.zeros(2, 2, 5, 3),)}, "1 parts, expected the pair"),
    "normaliser": (
        {"output_normalizer": True, "normalize": False},
        "output_normalizer is given with normalize=False.*use normalize=True",
    ),
    "backend": ({"backend": "fast"}, "Unknown backend 'fast'; expected 'auto' or one of .*'chunked'"),
    "unable": ({"backend": "recurrent", "causal": False}, "'recurrent' cannot run .* causal.*'chunked'"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_errors_name_the_argument_and_what_was_expected(wrong):
    changes, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_affinity_and_responsibilities_check_their_arguments():
    tensors = Problem().tensors()
    mixture = (tensors["means"], tensors["raw_variances"], tensors["prior_logits"])
    with pytest.raises(ValueError, match="key has shape"):
        gaussian_mixture_affinity(tensors["query"], tensors["key"][..., :3], *mixture)
    with pytest.raises(ValueError, match="means has shape"):
        gaussian_mixture_responsibilities(tensors["key"][..., :3], *mixture)


def test_what_is_asked_for_follows_the_output_in_a_fixed_order():
    output = call()
    normalizer = call(output_normalizer=True)[1]
    S, z = call(output_final_state=True)[1]
    everything = call(output_normalizer=True, output_final_state=True)
    assert normalizer.shape == output.shape[:3]
    for actual, expected in zip((*everything[:2], *everything[2]), (output, normalizer, S, z), strict=True):
        assert torch.equal(actual, expected)


def named_after_what_runs(monkeypatch) -> list[str]:
    """A list that grows by the name of every way of attention that runs."""
    taken = []

    def spy(way):
        def run(attention_call):
            taken.append(way.name)
            return way.run(attention_call)

        return way._replace(run=run)

    monkeypatch.setattr(WAYS, "ways", tuple(spy(way) for way in WAYS.ways))
    return taken


def test_auto_takes_the_recurrence_for_a_token_and_chunks_for_many(monkeypatch):
    taken = named_after_what_runs(monkeypatch)
    for length in (1, 100):
        gaussian_mixture_attention(**Problem(length=length).tensors())
    gaussian_mixture_attention(**Problem(length=1).tensors(), causal=False)
    assert taken == ["recurrent", "chunked", "chunked"]


def test_every_backend_can_be_named(monkeypatch):
    assert available_backends() == tuple(way.name for way in WAYS.ways) == dispatch.BACKENDS
    taken = named_after_what_runs(monkeypatch)
    for name in ("recurrent", "chunked", "reference"):
        call(backend=name)
    assert taken == ["recurrent", "chunked", "reference"]


def test_the_environment_forces_a_backend(monkeypatch):
    taken = named_after_what_runs(monkeypatch)
    monkeypatch.setenv("GMA_HF_BACKEND", "reference")
    call(backend="chunked")
    assert taken == ["reference"]
    monkeypatch.setenv("GMA_HF_BACKEND", "recurrent")
    with pytest.raises(
        ValueError, match=r"'recurrent' cannot run .* Unset GMA_HF_BACKEND, or use 'auto' or .*'chunked'"
    ):
        call(causal=False)
    monkeypatch.setenv("GMA_HF_BACKEND", "recurent")
    with pytest.raises(
        ValueError, match=r"Unknown backend 'recurent' in GMA_HF_BACKEND; expected 'auto' or .*'recurrent'"
    ):
        call()


def way(name: str, reason: str | None = None, suits: bool = True) -> Way:
    return Way(name, lambda *call: reason, lambda *call: suits)


def walk(*ways: Way) -> Ways:
    """The table of an operator; the ways register themselves in any order."""
    table = Ways("walk", tuple(way.name for way in ways))
    for one in reversed(ways):
        table.register(one)
    return table


def test_the_first_way_that_suits_and_can_is_taken_and_the_reason_logged_once(monkeypatch, caplog):
    monkeypatch.delenv("GMA_HF_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_EXPLAINED", set())
    ways = walk(way("triton", "it is Tuesday."), way("recurrent", suits=False), way("chunked"), way("reference"))
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert [ways.choose().name for _ in range(2)] == ["chunked", "chunked"]
    assert [record.message for record in caplog.records] == [
        "The triton backend cannot run this walk: it is Tuesday. Plain PyTorch runs it."
    ]
    assert ways.choose(backend="recurrent").name == "recurrent"  # what is named need not suit
    with pytest.raises(ValueError, match=r"cannot run this walk: it is Tuesday. Use 'auto' or one of .*'chunked'"):
        ways.choose(backend="triton")


@pytest.mark.parametrize("name", ["chunked", "recurrent", "reference"])
def test_operators_with_two_ways_are_plain_pytorch_for_every_other_backend(name, monkeypatch):
    monkeypatch.setenv("GMA_HF_BACKEND", name)
    assert walk(way("triton"), way("pytorch")).choose().name == "pytorch"
    monkeypatch.setenv("GMA_HF_BACKEND", "trition")
    with pytest.raises(ValueError, match="Unknown backend 'trition' in GMA_HF_BACKEND"):
        walk(way("triton"), way("pytorch")).choose()


CASES = {
    "causal": {},
    "everything": {"weights": True, "decay": True, "state": True, "packed": True},
    "normaliser": {"normalizer": True},
    "correlated": {"correlate": True, "weights": True, "decay": True},
    "correlated bidirectional": {"correlate": True, "causal": False},
    "bidirectional, normaliser": {"causal": False, "weights": True, "normalizer": True},
    "packed bidirectional": {"causal": False, "packed": True},
}


@pytest.mark.parametrize("case", list(CASES))
def test_compiles_into_one_graph_forward_and_backward(case):
    """Captured and differentiated ahead of time as one graph; code generation is the compiler's business."""
    torch._dynamo.reset()
    problem = Problem(length=70, **CASES[case])
    ids = problem.sequence_ids()
    compiled = torch.compile(gaussian_mixture_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (gaussian_mixture_attention, compiled):
        leaves = {name: x.requires_grad_() for name, x in problem.tensors().items()}
        state = {"initial_state": (leaves["S"], leaves["z"])} if problem.state else {}
        arguments = {name: x for name, x in leaves.items() if name not in ("S", "z")}
        output = function(
            **arguments,
            **state,
            causal=problem.causal,
            sequence_ids=ids,
            output_normalizer=problem.normalizer,
            normalize=problem.normalize,
            correlate=problem.correlate,
        )
        outputs = output if problem.normalizer else (output,)
        grads = torch.autograd.grad(sum(x.sin().sum() for x in outputs), list(leaves.values()))
        named = {str(i): x.detach() for i, x in enumerate(outputs)}
        results.append({**named, **dict(zip(leaves, grads, strict=True))})
    assert_close(*results, 1e-11)


def test_new_lengths_do_not_recompile():
    torch._dynamo.reset()
    compiled = torch.compile(gaussian_mixture_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(**Problem(length=100).tensors())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (64, 130, 700):
            tensors = Problem(length=length).tensors()
            torch.testing.assert_close(compiled(**tensors), gaussian_mixture_attention(**tensors))


def test_decoding_compiles_once():
    torch._dynamo.reset()
    compiled = torch.compile(gaussian_mixture_attention, fullgraph=True, backend="aot_eager")
    state = None
    problem = Problem(length=6, weights=True, decay=True, state=True)
    tensors = problem.tensors()
    state = (tensors.pop("S"), tensors.pop("z"))
    sliced = ("query", "key", "value", "write_weight", "log_decay", "delta_strength")
    outputs = []
    for t in range(6):
        token = {name: x[:, :, t : t + 1].clone() if name in sliced else x for name, x in tensors.items()}
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=t > 0):
            output, state = compiled(**token, initial_state=state, output_final_state=True)
        outputs.append(output)
    whole = problem.run(problem.tensors(), backend="reference")
    assert_close(whole, {"output": torch.cat(outputs, dim=2), "S": state[0], "z": state[1]}, 1e-11)


def test_exports_with_a_dynamic_length():
    class Layer(torch.nn.Module):
        def forward(self, query, key, value, means, raw_variances, prior_logits):
            return gaussian_mixture_attention(
                query, key, value, means, raw_variances, prior_logits, output_normalizer=True
            )

    dynamic = {name: {2: torch.export.Dim.DYNAMIC} for name in ("query", "key", "value")}
    dynamic |= {"means": None, "raw_variances": None, "prior_logits": None}
    exported = torch.export.export(Layer(), tuple(Problem(length=100).tensors().values()), dynamic_shapes=dynamic)
    other = tuple(Problem(length=333).tensors().values())
    torch.testing.assert_close(exported.module()(*other), gaussian_mixture_attention(*other, output_normalizer=True))


def test_there_is_room_for_the_state_before_every_block_and_after_the_last():
    assert all(len(causal_blocks(length)) + 1 <= state_slots(length) for length in range(1300))


@pytest.mark.quick
@pytest.mark.parametrize("floor", [-1, math.nan, math.inf, "1", True])
def test_responsibilities_refuse_an_impossible_floor_of_the_variances(floor):
    tensors = Problem().tensors()
    mixture = (tensors[name] for name in ("means", "raw_variances", "prior_logits"))
    with pytest.raises(ValueError, match="variance_floor is"):
        gaussian_mixture_responsibilities(tensors["query"], *mixture, variance_floor=floor)
