# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Packed sequences with a state each: what a sequence would give alone, forward and backward, by every way of the operator."""

import pytest
import torch
from hypothesis import given

from gma_hf.ops import dispatch, gaussian_mixture_attention
from gma_hf.ops.attention import packed
from gma_hf.ops.attention.packed import similar_lengths

from .kernels import KernelProblem, RoundedProblem
from .problems import EPS, QKV, Problem, assert_close, few_examples, problems


EACH = {"packed": True, "state": True, "states": True}
BACKENDS = ["reference", "chunked", "recurrent", "auto"]
SLICED = (*QKV, "write_weight", "log_decay", "delta_strength")
FEATURES = {
    "paper": {},
    "normaliser": {"normalizer": True, "weights": True},
    "gated": {"weights": True, "decay": True, "normalize": False},
    "grouped heads": {"decay": True, "key_heads": 2, "mixtures_per_key_head": 2, "queries_per_mixture": 2},
    "correlated": {"correlate": True, "weights": True, "decay": True},
    "bidirectional": {"causal": False, "weights": True, "normalizer": True},
}


class SeparateProblem(Problem):
    """The same numbers from one call a sequence, by the definition."""

    def run(self, tensors, **options):
        ids, (batch, spare) = self.sequence_ids(), tensors["S"].shape[:2]
        found = {"output": [], "normalizer": [], "S": [], "z": []}
        for row in range(batch):
            runs = (ids[row].diff(prepend=ids[row, :1]) != 0).cumsum(0)
            parts = {name: [] for name in found}
            for sequence in range(spare):
                mine = (runs == sequence).nonzero().flatten()
                S, z = tensors["S"][row, sequence], tensors["z"][row, sequence]
                if len(mine) == 0:
                    parts["S"].append(S)
                    parts["z"].append(torch.zeros_like(z) if self.correlate else z)
                    continue
                output, *normalizer, state = gaussian_mixture_attention(
                    **{
                        name: x[row : row + 1, :, mine] if name in SLICED else x
                        for name, x in tensors.items()
                        if name not in ("S", "z")
                    },
                    causal=self.causal,
                    normalize=self.normalize,
                    correlate=self.correlate,
                    initial_state=(S[None], z[None]),
                    output_final_state=True,
                    output_normalizer=self.normalize and self.normalizer,
                    eps=EPS,
                    backend="reference",
                )
                for name, x in zip(("output", "normalizer"), (output, *normalizer), strict=False):
                    parts[name].append(x[0])
                parts["S"].append(state[0][0])
                parts["z"].append(state[1][0])
            for name in ("output", "normalizer"):
                if parts[name]:
                    found[name].append(torch.cat(parts[name], dim=1))
            for name in ("S", "z"):
                found[name].append(torch.stack(parts[name]))
        return {name: torch.stack(rows) for name, rows in found.items() if rows}


@pytest.mark.parametrize(
    ("features", "backend"),
    [
        (features, backend)
        for features, options in FEATURES.items()
        for backend in BACKENDS
        if backend != "recurrent" or options.get("causal", True)  # the recurrence is causal
    ],
)
def test_each_sequence_gives_what_it_gives_alone(features, backend):
    """Outputs, normalisers, final states and the gradient of every input. Rounding: see `test_backends`."""
    options = {**EACH, "length": 90, **FEATURES[features]}
    expected, actual = SeparateProblem(**options).results(), Problem(**options).results(backend=backend)
    assert_close(expected, actual, 1e-9 if options.get("correlate") else 1e-11)


@few_examples
@given(problems(max_length=60, **EACH))
def test_any_call_gives_what_its_sequences_give_alone(problem):
    separate = SeparateProblem(**vars(problem))
    assert_close(separate.results(), problem.results(backend="chunked"), 1e-9 if problem.correlate else 1e-11)


@pytest.mark.parametrize("features", FEATURES)
def test_the_kernels_give_what_each_sequence_gives_alone(features):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    options = {**EACH, "length": 40, "batch": 1, **FEATURES[features]}
    # float32 rounds at 6e-8; see `test_backends`
    assert_close(
        SeparateProblem(**options).results(), KernelProblem(**options).results(torch.float32, backend="triton"), 5e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("features", [name for name in FEATURES if name != "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_one_launch_gives_what_each_sequence_gives_alone(features, dtype, monkeypatch):
    """Lengths around the chunks of the kernel, two rows, states without a sequence. Rounding: see `test_triton`."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    options = {**EACH, "length": 150, **FEATURES[features]}
    problem = RoundedProblem(dtype=dtype, **options)
    tensors = problem.tensors()
    expected = SeparateProblem(**options).run(tensors)
    monkeypatch.setattr(packed, "attend_in_batches", None)
    given = {name: x.to(dtype if name in QKV else torch.float32) for name, x in tensors.items()}
    actual = problem.run(given, backend="triton")
    again = problem.run(given, backend="triton")
    assert all(torch.equal(x, again[name]) for name, x in actual.items())
    tolerance = 5e-5 if dtype == torch.float32 else 1e-2 if problem.correlate else 4e-3
    assert_close(expected, actual, tolerance)
    assert all(torch.equal(given[name], x.to(given[name].dtype)) for name, x in tensors.items())  # states, too


@torch.no_grad()
def test_what_the_kernel_for_packed_sequences_cannot_run_is_run_in_batches(caplog):
    """A state that does not fit a tile, gradients, a very long sequence; the log says why."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    calls = []
    for options in ({"components": 70, "value_dim": 70}, {}):
        problem = KernelProblem(**{**EACH, "length": 30, **options})
        tensors = {name: x.float() for name, x in problem.tensors().items()}
        with caplog.at_level("INFO", logger="gma_hf.ops.dispatch"), torch.set_grad_enabled(not options):
            dispatch._EXPLAINED.clear()
            if not options:
                tensors["query"].requires_grad_()
            calls.append(problem.run(tensors, backend="triton"))
        exact = {name: x.detach().double() for name, x in tensors.items()}
        assert_close(
            SeparateProblem(**vars(problem)).run(exact), {name: x.detach() for name, x in calls[-1].items()}, 5e-5
        )
    assert "The kernel for packed sequences cannot run this call: the state of a mixture does not fit" in caplog.text
    assert "it keeps nothing for a backward pass" in caplog.text


def test_gradients_are_those_of_finite_differences():
    problem = Problem(length=12, batch=1, components=3, weights=True, decay=False, **EACH)
    tensors = {name: x.requires_grad_() for name, x in problem.tensors().items()}

    def call(*values):
        return tuple(problem.run(dict(zip(tensors, values, strict=True)), backend="chunked").values())

    with torch.no_grad():
        tensors["write_weight"].add_(0.1)  # away from the corner at 0
    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@pytest.mark.quick
def test_a_long_prompt_beside_many_short_ones():
    """As an engine packs a step: one row, lengths from 1 to 200; the padded numbers stay below twice the real ones."""
    lengths = [200, 1, 1, 3, 90, 64, 1, 17, 199, 1]
    ids = torch.repeat_interleave(torch.arange(10), torch.tensor(lengths))[None]
    tensors = Problem(length=sum(lengths), batch=1, weights=True, decay=True).tensors()
    state = torch.randn(1, 10, 1, 5, 3, dtype=torch.float64), torch.rand(1, 10, 1, 5, dtype=torch.float64)
    output, (S, z) = gaussian_mixture_attention(
        **tensors, sequence_ids=ids, initial_state=state, output_final_state=True
    )
    first = 0
    for i, length in enumerate(lengths):
        part = {name: x[:, :, first : first + length] if name in SLICED else x for name, x in tensors.items()}
        alone, last = gaussian_mixture_attention(
            **part, initial_state=(state[0][:, i], state[1][:, i]), output_final_state=True, backend="reference"
        )
        torch.testing.assert_close(output[:, :, first : first + length], alone, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close((S[:, i], z[:, i]), last, rtol=1e-9, atol=1e-11)
        first += length
    padded = sum(len(members) * lengths[members[0]] for members in similar_lengths(lengths))
    assert padded < 2 * sum(lengths)


@pytest.mark.quick
def test_continued_step_by_step_it_is_one_sequence():
    """Chunked prefill: three steps that cut every sequence elsewhere give what one call gives."""
    problem = Problem(length=60, batch=1, weights=True, decay=True, normalizer=True)
    tensors, cuts = problem.tensors(), [(0, 20, 41, 60), (0, 1, 59, 60)]
    both = {name: torch.cat([x, x.flip(2)]) if name in SLICED else x for name, x in tensors.items()}
    whole = gaussian_mixture_attention(**both)
    state = torch.zeros(1, 2, 1, 5, 3, dtype=torch.float64), torch.zeros(1, 2, 1, 5, dtype=torch.float64)
    for step in range(3):
        spans = [slice(cut[step], cut[step + 1]) for cut in cuts]
        packed = {
            name: torch.cat([x[row : row + 1, :, span] for row, span in enumerate(spans)], dim=2) if name in SLICED else x
            for name, x in both.items()
        }  # fmt: skip
        counts = torch.tensor([span.stop - span.start for span in spans])
        ids = torch.repeat_interleave(torch.arange(2), counts)[None]
        output, state = gaussian_mixture_attention(
            **packed, sequence_ids=ids, initial_state=state, output_final_state=True
        )
        expected = torch.cat([whole[row : row + 1, :, span] for row, span in enumerate(spans)], dim=2)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.quick
def test_where_a_batch_costs_more_than_padding_there_are_fewer_batches():
    lengths = [200, 1, 0, 150, 90, 64, 17]
    assert similar_lengths(lengths) == [[0, 3], [4], [5], [6, 1]]
    assert similar_lengths(lengths, free_tokens=300) == [[0, 3, 4, 5], [6, 1]]
    assert similar_lengths(lengths, free_tokens=8192) == [[0, 3, 4, 5, 6, 1]]
    assert similar_lengths(lengths, lambda i: (i < 4,), free_tokens=8192) == [[4, 5, 6], [0, 3, 1]]


@pytest.mark.quick
def test_what_does_not_fit_is_an_error():
    problem = Problem(length=6, batch=1)
    tensors, ids = problem.tensors(), torch.tensor([[0, 0, 1, 1, 2, 2]])
    state = torch.zeros(1, 2, 1, 5, 3, dtype=torch.float64), torch.zeros(1, 2, 1, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Row 0 of sequence_ids has more than 2 sequences.*a state for each"):
        gaussian_mixture_attention(**tensors, sequence_ids=ids, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state S has shape.*Only packed sequences have a state each"):
        gaussian_mixture_attention(**tensors, initial_state=state)
    with pytest.raises(ValueError, match="initial_state z has shape"):
        gaussian_mixture_attention(**tensors, sequence_ids=ids, initial_state=(state[0], state[1][:, :1]))
    with pytest.raises(ValueError, match="the recurrence is causal"):
        gaussian_mixture_attention(
            **tensors, sequence_ids=ids // 2, initial_state=state, causal=False, backend="recurrent"
        )


@pytest.mark.quick
def test_no_tokens_leave_the_states_as_they_are():
    problem = Problem(length=0, batch=1)
    state = torch.randn(1, 2, 1, 5, 3, dtype=torch.float64), torch.rand(1, 2, 1, 5, dtype=torch.float64)
    output, last = gaussian_mixture_attention(
        **problem.tensors(), sequence_ids=torch.zeros(1, 0, dtype=torch.long), initial_state=state,
        output_final_state=True,
    )  # fmt: skip
    assert output.shape == (1, 1, 0, 3)
    torch.testing.assert_close(last, state)


def test_compiled_with_a_break_of_the_graph_the_numbers_are_the_same():
    torch._dynamo.reset()
    problem = Problem(length=50, weights=True, decay=True, **EACH)
    tensors = problem.tensors()
    compiled = torch.compile(problem.run, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), problem.run(tensors), rtol=1e-11, atol=1e-12)
