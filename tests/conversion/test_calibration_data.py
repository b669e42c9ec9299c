# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What calibration does not take, or takes and warns of: texts instead of tokens, too few tokens, impossible numbers."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gma_hf import convert_to_gma, gma_layers
from gma_hf.conversion import as_teacher, calibrate
from gma_hf.conversion.calibration import calibrate as calibrate_module
from gma_hf.conversion.calibration import mixture_fitting
from tests.conversion.tiny_models import VOCAB, make_converted_model, make_inputs, make_softmax_model, output_of


def corpus(rows=8, length=40, seed=4):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a text", "must be batches or examples, got a str: tokenize the text first"),
        ({"input_ids": [[3, 4]]}, r"got a dict: put a single batch into a list, `\[batch\]`"),
        (["a text", "another"], "An item of the data is a str, 'a text', where a tensor .* Tokenize the texts first"),
        ([""], "An item of the data is a str, ''"),
        ([None], "An item of the data is None"),
        ([[3, 4, 5]], "An item of the data is a list"),
        (
            [{"text": "a text"}],
            "has no 'input_ids', which GMALlamaForCausalLM takes; it has \\['text'\\]. Tokenize the data",
        ),
        ([torch.tensor([[3, VOCAB]])], f"token ids from 3 to {VOCAB}, but GMALlamaForCausalLM knows 0 to {VOCAB - 1}"),
        (
            [{"input_ids": [3, 4, VOCAB + 7]}],
            f"token ids from 3 to {VOCAB + 7}, but .* with the tokenizer of the model",
        ),
        ([], "The calibration set is empty"),
        (None, "must be batches or examples, got None. Give a list"),
        (3, "must be batches or examples, got 3"),
        ([{"input_ids": []}], r"of shape \(0,\) .*expected a list of at least one token id"),
        ([{"input_ids": [0.5, 1.5]}], "type torch.float32; expected a list"),
    ],
)
def test_data_that_the_model_cannot_read_are_refused_with_what_to_do(data, message):
    with pytest.raises(ValueError, match=message):
        calibrate(make_converted_model("llama"), data, progress=False)


@pytest.mark.parametrize("name", ["max_tokens", "num_samples", "evaluation_tokens", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_impossible_sizes_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        calibrate(make_converted_model("llama"), [corpus()], progress=False, **{name: value})


def test_too_few_tokens_are_told_with_numbers():
    model = convert_to_gma(make_softmax_model("llama"), num_components=16)
    with pytest.raises(ValueError, match="has 7 tokens, too few to fit 16 components"):
        calibrate(model, [corpus(1, 7)], progress=False)
    with pytest.raises(
        ValueError, match="`num_samples=7` keeps 14 queries and keys per head, too few to fit 16 components"
    ):
        calibrate(model, [corpus()], progress=False, num_samples=7)
    with pytest.warns(
        UserWarning, match=r"has 40 queries and keys per head to fit 16 components, 2.5 for each.*at least 128 tok"
    ):
        calibrate(model, [corpus(1, 20)], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [corpus(8, 40)], progress=False)


def test_a_calibration_that_improves_nothing_says_so(monkeypatch):
    model = convert_to_gma(make_softmax_model("llama"), num_components=6)
    unchanged = {"error_before": 0.5, "error_after": 0.5, "temperature": 1.0}
    monkeypatch.setattr(calibrate_module, "choose_width", lambda call, fitted: unchanged)
    with pytest.warns(
        UserWarning, match=r"on 320 tokens brought no layer nearer to softmax: .* was 0.5 and is 0.5. Give more"
    ):
        calibrate(model, [corpus()], progress=False)


class NoFloat64(TorchDispatchMode):
    """A device such as Apple's, which has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype != torch.float64, function
        return result


def test_mixtures_are_fitted_on_devices_without_float64(monkeypatch):
    samples = torch.randn(2, 300, 5, generator=torch.Generator().manual_seed(0))
    fit = [samples, 6]
    wide = mixture_fitting.fit_mixtures(*fit, generator=torch.Generator().manual_seed(1))
    assert mixture_fitting.wide_dtype(torch.device("mps")) == torch.float32
    monkeypatch.setattr(mixture_fitting, "wide_dtype", lambda device: torch.float32)
    with NoFloat64():
        narrow = mixture_fitting.fit_mixtures(*fit, generator=torch.Generator().manual_seed(1))
    # k-means++ draws other samples, so that the mixtures differ; how well they explain the samples does not
    torch.testing.assert_close(narrow.log_likelihood[-1], wide.log_likelihood[-1], rtol=0.02, atol=0)
    assert (narrow.log_posterior.diff(dim=0) > -1e-3).all()


@pytest.mark.parametrize("options", [{}, {"layers": [1], "window_size": 3}], ids=["all", "one layer kept"])
def test_a_teacher_inside_a_teacher_is_a_teacher_and_so_is_the_outer_one_afterwards(options):
    tokens = make_inputs("llama")["input_ids"]
    softmax = output_of(make_softmax_model("llama"), input_ids=tokens)
    model = make_converted_model("llama", **options)
    expected = output_of(model, input_ids=tokens)
    seen = {"outer": 0, "inner": 0}

    def count(name):
        def observe(call):
            seen[name] += 1

        return observe

    with as_teacher(model, count("outer")):
        with as_teacher(model, count("inner")):
            assert torch.equal(output_of(model, input_ids=tokens, use_cache=False), softmax)
        assert seen == {"outer": 0, "inner": len(gma_layers(model))}
        assert torch.equal(output_of(model, input_ids=tokens, use_cache=False), softmax)
        with pytest.raises(KeyboardInterrupt), as_teacher(model, students=gma_layers(model).values()):
            torch.testing.assert_close(output_of(model, input_ids=tokens, use_cache=False), expected)
            raise KeyboardInterrupt
        assert torch.equal(output_of(model, input_ids=tokens, use_cache=False), softmax)
    assert seen["outer"] == 2 * len(gma_layers(model))
    assert torch.equal(output_of(model, input_ids=tokens), expected)
