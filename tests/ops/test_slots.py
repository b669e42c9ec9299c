# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""States in slots: a call advances the slots that it names, as the public function would, and touches no other."""

import pytest
import torch

from gma_hf.ops import gaussian_mixture_attention, gaussian_mixture_attention_in_slots
from gma_hf.ops.attention import functional
from gma_hf.ops.attention import slots as in_slots
from gma_hf.ops.attention.call import validate_call

from .kernels import DEVICE
from .problems import MIXTURE, Problem


pytestmark = pytest.mark.quick
FEATURES = {
    "paper": {},
    "gated": {"weights": True, "decay": True, "normalize": False},
    "grouped heads": {"decay": True, "key_heads": 2, "mixtures_per_key_head": 2, "queries_per_mixture": 2},
    "correlated": {"correlate": True, "weights": True, "decay": True},
    "delta rule": {"delta": True, "correlate": True, "decay": True, "key_heads": 2},
    "many values": {"components": 20, "value_dim": 70, "weights": True},  # several programs read one z
}
SLOTS = [5, 0, 3]


def pool(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Seven slots, those of nobody poisoned; as an engine lays them out, S and z of a slot in one page."""
    sizes = (problem.mixtures, problem.components, problem.value_dim)
    pages = torch.full((7, sizes[0] * sizes[1] * (sizes[2] + 1) + 4), torch.nan, dtype=dtype, device=DEVICE)
    S = pages[:, : sizes[0] * sizes[1] * sizes[2]].unflatten(1, sizes)
    z = pages[:, -sizes[0] * sizes[1] :].unflatten(1, sizes[:2])
    generator = torch.Generator().manual_seed(7)
    S[SLOTS] = torch.randn(3, *sizes, generator=generator, dtype=dtype).to(DEVICE)
    z[SLOTS] = torch.rand(3, *sizes[:2], generator=generator, dtype=dtype).to(DEVICE)
    if problem.correlate:
        z[SLOTS] = 0.0
    return S, z


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("backend", ["triton", "auto"])
@torch.no_grad()
def test_the_slots_are_advanced_as_the_rows_of_a_batch(features, length, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    problem = Problem(batch=3, length=length, **FEATURES[features])
    dtype = torch.float32 if backend == "triton" else torch.float64
    tensors = {name: x.to(DEVICE, dtype) for name, x in problem.tensors().items()}
    options = {"normalize": problem.normalize, "correlate": problem.correlate}
    S, z = pool(problem, dtype)
    exact = {name: x.double() for name, x in tensors.items()}
    expected, after = gaussian_mixture_attention(
        **exact, **options, initial_state=(S[SLOTS].double(), z[SLOTS].double()), output_final_state=True,
        backend="reference",
    )  # fmt: skip
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)
    output = gaussian_mixture_attention_in_slots(**tensors, **options, states=(S, z), slots=slots, backend=backend)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if backend == "triton" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(output.double(), expected, **tolerance)
    torch.testing.assert_close((S[SLOTS].double(), z[SLOTS].double()), after, **tolerance)
    others = [slot for slot in range(7) if slot not in SLOTS]
    assert S[others].isnan().all() and z[others].isnan().all()


@torch.no_grad()
def test_a_packed_prefill_and_then_steps_are_one_text():
    """Three streams of 9, 1 and 20 tokens, packed, and then two tokens each, step by step."""
    problem = Problem(batch=3, length=22, weights=True, decay=True)
    tensors, lengths = problem.tensors(), [9, 1, 20]
    S, z = pool(problem, torch.float64)
    S[SLOTS], z[SLOTS] = 0.0, 0.0
    slots = torch.tensor(SLOTS)
    by_token = [name for name in tensors if name not in ("means", "raw_variances", "prior_logits")]

    def cut(*spans):
        """One row of the tokens `spans[i]` of stream i."""
        return tensors | {
            name: torch.cat([tensors[name][i : i + 1, :, a:b] for i, (a, b) in enumerate(spans)], dim=2)
            for name in by_token
        }

    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    outputs = gaussian_mixture_attention_in_slots(
        **cut(*((0, n) for n in lengths)), sequence_ids=ids, states=(S, z), slots=slots
    ).split(lengths, dim=2)
    outputs = [[output] for output in outputs]
    for step in range(2):
        tokens = {
            name: torch.cat([x[i : i + 1, :, n + step, None] for i, n in enumerate(lengths)]) if name in by_token else x
            for name, x in tensors.items()
        }  # fmt: skip
        output = gaussian_mixture_attention_in_slots(**tokens, states=(S, z), slots=slots)
        for i in range(3):
            outputs[i].append(output[i : i + 1])
    whole = gaussian_mixture_attention(**tensors)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(
            torch.cat(outputs[i], dim=2), whole[i : i + 1, :, : length + 2], rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("features", [name for name in FEATURES if name != "many values"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("given", ["ids", "lengths"])
@torch.no_grad()
def test_packed_sequences_advance_their_slots_as_each_would_alone(features, backend, given):
    """Three streams in one row, by their ids or their lengths; other slots are not touched."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    lengths = [37, 1, 22]
    problem = Problem(batch=1, length=sum(lengths), **FEATURES[features])
    dtype = torch.float32 if backend == "triton" else torch.float64
    tensors = {name: x.to(DEVICE, dtype) for name, x in problem.tensors().items()}
    options = {"normalize": problem.normalize, "correlate": problem.correlate}
    S, z = pool(problem, dtype)
    exact, expected, after, first = {name: x.double() for name, x in tensors.items()}, [], [], 0
    for slot, length in zip(SLOTS, lengths, strict=True):
        by_token = [name for name in exact if name not in MIXTURE]
        part = exact | {name: exact[name][:, :, first : first + length] for name in by_token}
        output, *normalizer, state = gaussian_mixture_attention(
            **part, **options, initial_state=(S[[slot]].double(), z[[slot]].double()), output_final_state=True,
            output_normalizer=problem.normalize, backend="reference",
        )  # fmt: skip
        expected.append((output, *normalizer))
        after.append(state)
        first += length
    sequences = {"sequence_lengths": lengths}
    if given == "ids":
        sequences = {"sequence_ids": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(DEVICE)}
    found = gaussian_mixture_attention_in_slots(
        **tensors, **options, **sequences, states=(S, z), slots=torch.tensor(SLOTS, device=DEVICE),
        output_normalizer=problem.normalize, backend=backend,
    )  # fmt: skip
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if backend == "triton" else {"rtol": 1e-9, "atol": 1e-11}
    for x, parts in zip(found if problem.normalize else (found,), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(x.double(), torch.cat(parts, dim=2), **tolerance)
    for x, parts in zip((S, z), zip(*after, strict=True), strict=True):
        torch.testing.assert_close(x[SLOTS].double(), torch.cat(parts), **tolerance)
    others = [slot for slot in range(7) if slot not in SLOTS]
    assert S[others].isnan().all() and z[others].isnan().all()


@pytest.mark.parametrize("backend", ["triton", "auto"])
@torch.no_grad()
def test_a_step_returns_its_normaliser(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    problem = Problem(batch=3, length=1, weights=True)
    tensors = {name: x.to(DEVICE, torch.float32) for name, x in problem.tensors().items()}
    S, z = pool(problem, torch.float32)
    before = S[SLOTS].double(), z[SLOTS].double()
    slots = torch.tensor(SLOTS, device=DEVICE)
    found = gaussian_mixture_attention_in_slots(
        **tensors, states=(S, z), slots=slots, output_normalizer=True, backend=backend
    )
    exact = {name: x.double() for name, x in tensors.items()}
    expected = gaussian_mixture_attention(**exact, initial_state=before, output_normalizer=True, backend="reference")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_lengths_that_are_not_those_of_the_row_are_an_error():
    problem = Problem(batch=1, length=6)
    tensors, (S, z) = problem.tensors(), pool(problem, torch.float64)
    S, z = S.cpu(), z.cpu()

    def call(**changes):
        given = {**tensors, "states": (S, z), "slots": torch.tensor(SLOTS), **changes}
        return gaussian_mixture_attention_in_slots(**given)

    with pytest.raises(ValueError, match="add up to 7, but the row has 6 tokens"):
        call(sequence_lengths=[3, 3, 1])
    with pytest.raises(ValueError, match="sequence_lengths has -1, expected integers"):
        call(sequence_lengths=[3, 4, -1])
    with pytest.raises(ValueError, match=r"slots has shape \[3\], expected \[sequences\] = \[2\]"):
        call(sequence_lengths=[3, 3])
    with pytest.raises(ValueError, match="pass one"):
        call(sequence_lengths=[3, 2, 1], sequence_ids=torch.zeros(1, 6, dtype=torch.long))


def test_what_does_not_fit_is_an_error():
    problem = Problem(batch=3, length=1)
    tensors, (S, z) = problem.tensors(), pool(problem, torch.float64)
    S, z = S.cpu(), z.cpu()
    slots = torch.tensor(SLOTS)

    def call(**changes):
        return gaussian_mixture_attention_in_slots(**{**tensors, "states": (S, z), "slots": slots, **changes})

    with pytest.raises(ValueError, match=r"slots has shape \[2\], expected \[batch\] = \[3\]"):
        call(slots=slots[:2])
    with pytest.raises(ValueError, match=r"slots has dtype torch\.float32"):
        call(slots=slots.float())
    with pytest.raises(ValueError, match=r"S of states has dtype torch\.bfloat16, expected torch\.float64"):
        call(states=(S.bfloat16(), z))
    with pytest.raises(ValueError, match="z of states has shape"):
        call(states=(S, z[:, :, :2]))
    with pytest.raises(ValueError, match="states has 1 parts, expected the pair"):
        call(states=(S,))
    for states in (S, None, {"S": S, "z": z}):
        with pytest.raises(ValueError, match=r"states is \w+, expected the pair"):
            call(states=states)
    with pytest.raises(ValueError, match="z of states is NoneType, expected a tensor"):
        call(states=(S, None))
    with pytest.raises(ValueError, match="S of states has shape"):
        call(states=(torch.tensor(0.0), z))
    with pytest.raises(ValueError, match="slots is list, expected a tensor"):
        call(slots=SLOTS)
    with pytest.raises(ValueError, match=r"z of states is on meta"):
        call(states=(S, z.to("meta")))
    with pytest.raises(ValueError, match="needs gradients, but the states are overwritten"):
        call(query=tensors["query"].requires_grad_())
    with torch.no_grad(), pytest.raises(ValueError, match="3 rows beside packed sequences, expected 1"):
        call(sequence_ids=torch.zeros(3, 1, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40])
def test_a_call_is_checked_once(length, monkeypatch):
    checked = []
    for module in (functional, in_slots):
        monkeypatch.setattr(module, "validate_call", lambda call, ids: checked.append(validate_call(call, ids)))
    problem = Problem(batch=3, length=length)
    states = pool(problem, torch.float64)
    gaussian_mixture_attention_in_slots(
        **{name: x.to(DEVICE) for name, x in problem.tensors().items()},
        states=states,
        slots=torch.tensor(SLOTS, device=DEVICE),
    )
    assert len(checked) == 1


@torch.no_grad()
def test_the_operator_in_slots_can_be_compiled():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    problem = Problem(batch=3, length=1, weights=True, decay=True)
    tensors = {name: x.to(DEVICE, torch.float32) for name, x in problem.tensors().items()}
    slots = torch.tensor(SLOTS, device=DEVICE)

    def step(S, z):
        return gaussian_mixture_attention_in_slots(**tensors, states=(S, z), slots=slots, backend="triton")

    eager, compiled = pool(problem, torch.float32), pool(problem, torch.float32)
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one[SLOTS], other[SLOTS])
