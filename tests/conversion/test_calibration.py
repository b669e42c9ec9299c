# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Mixtures are fitted to what they will route, and the converted model comes nearer to the original."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from gma_hf import convert_to_gma, gma_layers
from gma_hf.conversion.calibration import calibrate as calibration
from gma_hf.conversion.calibration.calibrate import SMALLEST_OVERLAP, calibrate, current_mixture, overlap
from gma_hf.conversion.calibration.data import Reservoir
from gma_hf.conversion.calibration.memory_weight import balance_memory, far_mass, memory_share
from gma_hf.conversion.calibration.mixture_fitting import fit_mixtures
from gma_hf.conversion.calibration.sensitivity import choose_layers, rank_layers
from gma_hf.conversion.calibration.teacher import as_teacher
from gma_hf.modeling.memory import GMAMemory
from tests.conversion.tiny_models import FAMILIES, make_inputs, make_softmax_model, output_of


quick = pytest.mark.quick


def tokens(batch_size=4, length=40, seed=5):
    return torch.randint(3, 99, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def mixture_samples(count=3000, seed=0):
    """Samples of two heads with three components each, and the truth: means, standard deviations, weights."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor([[[0.0, 0.0], [6.0, 0.0], [0.0, 8.0]], [[-50.0, 3.0], [-44.0, 3.0], [-50.0, -5.0]]])
    deviations = torch.tensor([[[1.0, 0.5], [0.3, 1.0], [1.0, 1.0]], [[0.5, 0.5], [1.0, 0.2], [0.7, 0.7]]])
    weights = torch.tensor([0.5, 0.3, 0.2])
    component = torch.multinomial(weights.expand(2, -1), count, replacement=True, generator=generator)
    heads = torch.arange(2)[:, None]
    noise = torch.randn(2, count, 2, generator=generator)
    return means[heads, component] + deviations[heads, component] * noise, means, deviations, weights


@quick
def test_a_mixture_is_recovered_from_its_samples():
    samples, means, deviations, weights = mixture_samples()
    fitted = fit_mixtures(samples, 3, em_steps=30, generator=torch.Generator().manual_seed(0))
    for head in range(2):
        order = torch.cdist(means[head], fitted.means[head]).argmin(dim=1)
        assert sorted(order.tolist()) == [0, 1, 2]
        # The smallest component has 600 samples: standard errors of mean, deviation and weight are 0.04, 0.03 and 0.01 times
        # deviations of at most 1; five of them
        torch.testing.assert_close(fitted.means[head, order], means[head], atol=0.2, rtol=0)
        torch.testing.assert_close(fitted.variances[head, order].sqrt(), deviations[head], atol=0.15, rtol=0)
        torch.testing.assert_close(fitted.prior_logits[head, order].exp(), weights, atol=0.05, rtol=0)


@quick
@pytest.mark.parametrize("case", ["clusters", "noise", "degenerate", "far"])
def test_every_em_step_raises_the_posterior(case):
    generator = torch.Generator().manual_seed(1)
    samples = {
        "clusters": mixture_samples(800)[0],
        "noise": torch.randn(3, 500, 8, generator=generator),
        # Fewer different samples than components: variances end at the floor
        "degenerate": torch.randn(2, 4, 5, generator=generator).repeat_interleave(50, dim=1),
        "far": 1e3 + torch.randn(2, 300, 4, generator=generator),
    }[case]
    fitted = fit_mixtures(samples, 10, em_steps=25, generator=generator)
    # Rounding of (x / sigma)^2 in float32: up to 10^4 where variances are small, times 10^-7
    assert (fitted.log_posterior.diff(dim=0) >= -1e-3).all()
    assert torch.allclose(fitted.prior_logits.exp().sum(dim=-1), torch.ones(samples.shape[0]))
    assert all(torch.isfinite(x).all() for x in fitted)
    assert (fitted.variances >= 1e-4).all()


def test_the_fit_is_that_of_a_gaussian_with_one_component():
    samples = mixture_samples(500)[0]
    fitted = fit_mixtures(samples, 1)
    torch.testing.assert_close(fitted.means[:, 0], samples.mean(dim=1), rtol=1e-4, atol=1e-3)
    # The pseudo-counts weigh a hundredth of one sample in 500
    torch.testing.assert_close(fitted.variances[:, 0], samples.var(dim=1, correction=0), rtol=1e-3, atol=0)


def test_heads_are_fitted_independently_and_the_seed_decides():
    samples = mixture_samples(400)[0]

    def fit(x, seed):
        return fit_mixtures(x, 5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(fit(samples, 3).means, fit(samples, 3).means)
    # A head alone has the likelihood of the same data whatever stands beside it, if not the same local maximum
    alone = fit_mixtures(samples[:1], 3, generator=torch.Generator().manual_seed(0)).log_likelihood[-1]
    together = fit_mixtures(samples, 3, generator=torch.Generator().manual_seed(0)).log_likelihood[-1]
    assert alone[0] == pytest.approx(together[0].item(), abs=0.3)


@pytest.mark.parametrize(
    ("samples", "message"),
    [(torch.randn(2, 4, 3), "at least 5 samples"), (torch.full((1, 9, 2), float("nan")), "NaN or infinite")],
)
def test_a_fit_to_bad_samples_says_why(samples, message):
    with pytest.raises(ValueError, match=message):
        fit_mixtures(samples, 5)


def test_the_reservoir_is_a_uniform_sample_without_padding():
    reservoir = Reservoir(200, torch.Generator().manual_seed(0))
    number = torch.arange(2000.0).view(10, 1, 200, 1)
    real = torch.ones(10, 200, dtype=torch.bool)
    real[:, 150:] = False
    for start in range(0, 10, 2):
        rows = number[start : start + 2]
        reservoir.add(rows.expand(-1, 4, -1, -1), rows, real[start : start + 2])
    kept = reservoir.query[0, :, 0]
    assert torch.equal(kept, reservoir.key[0, :, 0])  # the same tokens of both
    assert len(kept.unique()) == 200 and (kept % 200 < 150).all()
    assert reservoir.num_seen == 1500
    # Each of ten rows expects 20 of 200; the deviation of that count is 4.2, and five of them are 21
    assert torch.bincount((kept / 200).long(), minlength=10).sub(20).abs().max() < 20
    # Each head's queries, and the keys of its group
    samples = reservoir.samples(4)[..., 0]
    assert torch.equal(samples[:, :200], kept.expand(4, -1))
    assert torch.equal(samples[:, 200:], kept.expand(4, -1))


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=quick) if name in ("llama", "bert", "bart") else name for name in FAMILIES]
)
def test_within_the_context_a_converted_model_is_its_teacher(model_type):
    model, inputs = make_softmax_model(model_type), make_inputs(model_type)
    expected = output_of(model, **inputs)
    convert_to_gma(model, num_components=4, window_size=2)
    converted = output_of(model, **inputs)
    with as_teacher(model):
        assert torch.equal(output_of(model, **inputs), expected)
        layers = list(gma_layers(model).values())
    with as_teacher(model, students=layers):
        torch.testing.assert_close(output_of(model, **inputs), converted, rtol=1e-4, atol=1e-5)
    assert torch.equal(output_of(model, **inputs), converted)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_teacher_has_the_attention_implementation_of_the_model(implementation):
    model = make_softmax_model("llama")
    model.set_attn_implementation(implementation)
    expected = output_of(model, input_ids=tokens())
    convert_to_gma(model, layers=[1])
    with as_teacher(model):
        assert torch.equal(output_of(model, input_ids=tokens()), expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"window_size": 8}, marks=quick),
        {},
        {"use_routing_projections": True, "use_forgetting": True, "window_size": 8},
        {"layers": [1]},
    ],
)
def test_calibration_brings_the_model_nearer_to_its_teacher(options):
    model = make_softmax_model("llama")
    expected = output_of(model, input_ids=tokens(seed=9))
    convert_to_gma(model, num_components=16, **options)
    before = output_of(model, input_ids=tokens(seed=9))
    report = calibrate(model, tokens(16).split(4), progress=False)
    after = output_of(model, input_ids=tokens(seed=9))
    assert (after - expected).norm() < 0.8 * (before - expected).norm()
    assert list(report.layers) == list(gma_layers(model))
    assert report.num_tokens == 16 * 40
    for layer in report.layers.values():
        assert layer.log_likelihood_after > layer.log_likelihood_before
        assert layer.error_after < layer.error_before
    json.dumps(report.to_dict())


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_the_memory_weighs_what_softmax_pays_outside_of_the_window(num_sinks):
    model = convert_to_gma(make_softmax_model("llama"), num_components=8, window_size=6, num_sink_tokens=num_sinks)
    data = tokens(4, 32)
    report = calibrate(model, [data], progress=False)
    shares = {}

    def measure(call):
        routed = dict(zip(("routing_query", "routing_key"), call.routed(), strict=True))
        window, mixture = call.layer.window_norm, call.layer.mixture_norm
        affinity = GMAMemory().affinity(
            mixture, window, call.query, call.key, scaling=call.scaling, weigh_by_routing=True, **routed
        )
        index = torch.arange(32)
        is_far = (index[:, None] - index >= 6) & (index >= num_sinks)
        shares[call.module] = (affinity * is_far).sum(dim=-1).mean()

    with torch.no_grad(), as_teacher(model, measure):
        model(data, use_cache=False)
    for share, layer in zip(shares.values(), report.layers.values(), strict=True):
        # Bisection to 60 / 2^30, shares in float32
        assert share.item() == pytest.approx(layer.far_mass, abs=1e-4)


@quick
@pytest.mark.parametrize("padding", [0, 5])
def test_the_growth_of_the_memorys_share_is_recovered(padding):
    """Its share under known biases and dilutions tells them, within the bounds of a sum over tokens and a mean."""
    model = convert_to_gma(make_softmax_model("llama"), num_components=8, window_size=4, num_sink_tokens=1)
    data = torch.nn.functional.pad(tokens(3, 100), (padding, 0))
    mask = torch.nn.functional.pad(torch.ones(3, 100, dtype=torch.long), (padding, 0))
    bias, dilution = torch.tensor([0.5, -2.0, 1.0, 0.0]), torch.tensor([0.3, 0.8, -0.2, 1.3])
    recovered = []

    def measure(call):
        window = call.layer.window_norm
        window.memory_bias.copy_(bias)
        window.memory_dilution.copy_(dilution)
        balance_memory(call, call.real(), memory_share(call))
        recovered.append((window.memory_bias.clone(), window.memory_dilution.clone()))

    with torch.no_grad(), as_teacher(model, measure):
        model(data, attention_mask=mask if padding else None, use_cache=False)
    assert len(recovered) == 2
    for biases, dilutions in recovered:
        # Bisection to 2^-10, which moves the bias by as much times log(1 + 95 / 4)
        torch.testing.assert_close(dilutions, dilution.clamp(0.0, 1.0), rtol=0, atol=2**-10)
        torch.testing.assert_close(biases[:2], bias[:2], rtol=0, atol=4 * 2**-10)


@quick
@pytest.mark.parametrize(("model_type", "length"), [("llama", 23), ("bert", 60)])
def test_no_growth_is_read_from_less_than_three_windows_nor_where_all_see_all(model_type, length):
    model = convert_to_gma(make_softmax_model(model_type), num_components=4, window_size=8)
    calibrate(model, [tokens(2, length)], progress=False)
    for layer in gma_layers(model).values():
        assert layer.window_norm.memory_bias.any() and not layer.window_norm.memory_dilution.any()


@quick
def test_no_memory_is_left_out_of_reach_of_the_queries(monkeypatch):
    """A mixture so narrow that queries share nothing with keys may have the smallest error of all: its memory is off. But a
    memory of weight e^40 times 1e-17 is no place to start a training from."""
    monkeypatch.setattr(calibration, "WIDTHS", ((False, 1e-6), (True, 4.0)))
    monkeypatch.setattr(
        calibration, "output_errors", lambda call, real: current_mixture(call.layer)[1].mean(dim=(1, 2))
    )
    model = make_softmax_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:  # keys far from all queries, and logits as they were
            layer.self_attn.k_proj.weight *= 1000
            layer.self_attn.q_proj.weight /= 1000
    convert_to_gma(model, num_components=8, window_size=4)
    calibrate(model, [tokens()], progress=False)
    reached = []
    with torch.no_grad(), as_teacher(model, lambda call: reached.append(overlap(call, call.real()))):
        model(tokens(), use_cache=False)
    assert len(reached) == len(gma_layers(model))
    assert (torch.stack(reached) >= SMALLEST_OVERLAP).all()


@quick
def test_what_the_sink_tokens_get_is_not_the_memorys():
    """Their softmax share, counted in real tokens, is missing from the far mass."""
    model = convert_to_gma(make_softmax_model("llama"), num_components=4, window_size=5, num_sink_tokens=2)
    data = torch.nn.functional.pad(tokens(2, 20), (7, 0))
    mask = torch.nn.functional.pad(torch.ones(2, 20, dtype=torch.long), (7, 0))
    compared = []

    def measure(call):
        real = call.real()
        masses = []
        for num_sinks in (0, 2):
            call.layer.window_norm.num_sink_tokens = num_sinks
            masses.append(far_mass(call, real)[:, :, 7:].mean(dim=(0, 2)))
        query, key = call.query[:, :, 7:], call.key[:, :, 7:].repeat_interleave(2, dim=1)
        logits = call.scaling * query @ key.mT
        weights = logits.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(dim=-1)
        distance = torch.arange(20)[:, None] - torch.arange(20)
        sinks = (weights * (distance >= 5))[..., :2].sum(dim=-1).mean(dim=(0, 2))
        torch.testing.assert_close(masses[0] - masses[1], sinks, rtol=1e-4, atol=1e-6)
        compared.append(call.module)

    with torch.no_grad(), as_teacher(model, measure):
        model(data, attention_mask=mask, use_cache=False)
    assert len(compared) == 2


@pytest.mark.parametrize("window_size", [0, 4])
def test_padding_is_not_calibrated_on(window_size):
    def calibrated(batch):
        model = convert_to_gma(make_softmax_model("bert"), num_components=4, window_size=window_size)
        calibrate(model, [batch], progress=False)
        return {name: parameter.detach() for name, parameter in model.named_parameters() if ".gma." in name}

    data = tokens(4, 24)
    padded = torch.nn.functional.pad(data, (0, 7))
    mask = torch.nn.functional.pad(torch.ones_like(data), (0, 7))
    with_padding = calibrated({"input_ids": padded, "attention_mask": mask})
    for name, parameter in calibrated({"input_ids": data}).items():
        # The same samples; what differs is the order of float32 sums, through twenty steps of EM
        torch.testing.assert_close(with_padding[name], parameter, rtol=2e-3, atol=2e-3)


def test_batches_examples_and_loaders_are_the_same_data():
    data = tokens(8, 24)
    forms = {
        "tensors": data.split(8),
        "batches": [{"input_ids": data, "attention_mask": torch.ones_like(data)}],
        "examples": [{"input_ids": row.tolist()} for row in data],
        "loader": DataLoader([{"input_ids": row} for row in data], batch_size=8),
    }
    means = []
    for form in forms.values():
        model = convert_to_gma(make_softmax_model("llama"), num_components=4)
        calibrate(model, form, progress=False)
        means.append(gma_layers(model)["model.layers.1.self_attn"].mixture_norm.means.detach())
    for other in means[1:]:
        torch.testing.assert_close(other, means[0], rtol=2e-3, atol=2e-3)


def test_max_tokens_bounds_what_is_read():
    model = convert_to_gma(make_softmax_model("llama"), num_components=4)

    def endless():
        while True:
            yield tokens(2, 20)

    report = calibrate(model, endless(), max_tokens=200, num_samples=50, progress=False)
    assert report.num_tokens == 200 and report.num_samples == 50


def test_calibration_leaves_everything_but_the_mixtures_as_it_is():
    model = make_softmax_model("llama")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    convert_to_gma(model, num_components=4).train()
    calibrate(model, [tokens()], progress=False)
    assert model.training and all(module.training for module in model.modules())
    for name, parameter in weights.items():
        assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "calibration set is empty"),
        ([tokens(1, 3)], {"num_components": 16}, "3 tokens, too few to fit 16 components"),
        ([tokens(4, 8)], {"window_size": 8}, "8 tokens at most, so nothing ever leaves the window of 8"),
        ([tokens(4, 8)], {"window_size": 6, "num_sink_tokens": 2}, "window of 6 tokens but sink tokens \\(2\\)"),
        ([{"text": "words"}], {}, "has no 'input_ids'"),
    ],
)
@quick
def test_a_bad_calibration_set_is_refused_with_a_reason(data, options, message):
    model = convert_to_gma(make_softmax_model("llama"), **{"num_components": 4, **options})
    with pytest.raises(ValueError, match=message):
        calibrate(model, data, progress=False)


@quick
def test_only_converted_models_can_be_calibrated():
    with pytest.raises(ValueError, match="no converted layers"):
        calibrate(make_softmax_model("llama"), [tokens()], progress=False)


def test_running_out_of_memory_says_what_to_lower(monkeypatch):
    model = convert_to_gma(make_softmax_model("llama"), num_components=4)

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Reservoir, "add", fail)
    with pytest.raises(MemoryError, match="Lower `num_samples`"):
        calibrate(model, [tokens()], progress=False)


@quick
def test_the_ranking_measures_each_layer_alone_and_leaves_the_model_as_it_was():
    model = make_softmax_model("llama", num_hidden_layers=3)
    data = tokens(4)
    expected = output_of(model, input_ids=data)
    ranking = rank_layers(model, [data], num_components=4, progress=False)
    assert torch.equal(output_of(model, input_ids=data), expected)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sorted(layer.index for layer in ranking) == [0, 1, 2]
    assert ranking[0].distance >= ranking[1].distance >= ranking[2].distance > 0
    assert choose_layers(ranking, keep=1) == sorted(layer.index for layer in ranking[1:])

    # By hand: convert the most sensitive layer alone
    convert_to_gma(model, layers=[ranking[0].index], num_components=4)
    calibrate(model, [data], progress=False)
    log_probabilities = output_of(model, input_ids=data).log_softmax(dim=-1)
    target = expected.log_softmax(dim=-1)
    by_hand = (target.exp() * (target - log_probabilities)).sum(dim=-1).mean()
    # Layers draw different samples and seeds when they are not calibrated together
    assert ranking[0].distance == pytest.approx(by_hand.item(), rel=0.3)


def test_a_ranking_of_a_decoder_counts_as_the_conversion_does():
    ranking = rank_layers(make_softmax_model("bart"), [make_inputs("bart")], layers=["decoder"], num_components=4)
    assert sorted(layer.index for layer in ranking) == [2, 3]
    with pytest.raises(ValueError, match="`keep` must lie between 0 and 1"):
        choose_layers(ranking, keep=2)
    with pytest.raises(ValueError, match="needs it twice"):
        rank_layers(make_softmax_model("llama"), iter([tokens()]))
