# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The statistics are what their definitions say, whatever the batches, and padding does not count."""

import math

import pytest
import torch
from torch import nn

from gma_hf import GMAForCausalLM, GMAForMaskedLM
from gma_hf.analysis import (
    AnalysisError,
    LayerStatistics,
    Routing,
    RoutingStatistics,
    TokenBatch,
    collect_statistics,
    implied_affinity,
    responsibilities,
    route,
)
from gma_hf.analysis.routing import MARGIN_CAP
from gma_hf.analysis.statistics import MARGIN_EDGES
from gma_hf.modeling import GMAMemory, GMAMixture, Layout
from gma_hf.modeling.memory_parts import GMAWindow
from gma_hf.training import measure_mixture_health
from tests.conftest import make_model, tiny_config


# Sums of float32 in another order: 1e-7 times the root of some hundred terms, with room to spare
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def statistics_of(gamma, categories=None, num_categories=0):
    """Statistics from responsibilities `[tokens, C]` of one head."""
    gamma = gamma[None, None].float()
    ones = torch.ones(gamma.shape[:3])
    statistics = RoutingStatistics(num_categories)
    statistics.add(Routing(gamma, ones, ones, ones), torch.ones(1, gamma.shape[2], dtype=torch.bool), categories)
    return statistics


def mixture(num_heads=2, num_components=5, dim=3, seed=0):
    torch.manual_seed(seed)
    module = GMAMixture(num_heads, num_components, dim, variance_floor=1e-4, eps=1e-6)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


@pytest.mark.quick
def test_uniform_responsibilities_use_every_component_and_decide_nothing():
    uniform = statistics_of(torch.full((7, 8), 1 / 8))
    assert uniform.usage_perplexity.item() == pytest.approx(8)
    assert uniform.entropy.item() == pytest.approx(math.log(8))
    assert not uniform.dead_components.any()


@pytest.mark.quick
def test_one_hot_responsibilities_have_no_entropy_and_leave_the_others_dead():
    spread = statistics_of(torch.eye(8))
    assert spread.entropy.item() == 0
    assert spread.usage_perplexity.item() == pytest.approx(8)
    collapsed = statistics_of(torch.eye(8)[[3]].repeat(5, 1))
    assert collapsed.usage_perplexity.item() == pytest.approx(1)
    assert collapsed.dead_components[0].tolist() == [index != 3 for index in range(8)]


@pytest.mark.quick
def test_statistics_equal_brute_force_and_do_not_depend_on_the_batches(block):
    model = make_model(GMAForCausalLM, tiny_config(block))
    ids = torch.randint(3, 99, (6, 11), generator=torch.Generator().manual_seed(0))
    categories, types = ids % 4, torch.where(ids % 3 == 0, -1, ids % 5)

    def collect(size):
        batches = [
            TokenBatch({"input_ids": i}, c, t)
            for i, c, t in zip(ids.split(size), categories.split(size), types.split(size), strict=True)
        ]
        return collect_statistics(model, batches, num_categories=4, num_token_types=5)

    whole, parts = collect(6), collect(1)
    found = responsibilities(model, input_ids=ids)
    assert list(whole) == [f"model.layers.{i}.self_attn.mixture_norm" for i in gma_layers(model)]
    for name, layer in whole.items():
        for role in ("queries", "keys"):
            statistics, again = getattr(layer, role), getattr(parts[name], role)
            gamma = getattr(found[name], role).transpose(1, 2).flatten(0, 1).double()  # [tokens, heads, C]
            one_hot = torch.nn.functional.one_hot(categories.flatten(), 4).double()
            best = torch.nn.functional.one_hot(gamma.argmax(-1), gamma.shape[-1]).double()
            entropy = -(gamma * gamma.log()).sum(-1).mean(0)
            assert statistics.num_tokens == 66
            torch.testing.assert_close(statistics.usage, gamma.mean(0), **FLOAT32)
            torch.testing.assert_close(statistics.usage.sum(-1), torch.ones(4).double(), **FLOAT32)
            torch.testing.assert_close(statistics.entropy, entropy, **FLOAT32)
            torch.testing.assert_close(
                statistics.category_mass, torch.einsum("nhc,nk->hck", gamma, one_hot), **FLOAT32
            )
            assert torch.equal(statistics.category_counts, torch.einsum("nhc,nk->hck", best, one_hot).long())
            for top, counts, mean in statistics.top_tokens(head=1, component=2):
                occurrences = gamma[types.flatten() == top, 1, 2]
                assert counts == len(occurrences)
                assert mean == pytest.approx(occurrences.mean().item(), rel=1e-5)
                assert mean > statistics.usage[1, 2]
            for value in ("usage", "entropy", "margin", "stability_bound", "sensitivity", "category_mass"):
                torch.testing.assert_close(getattr(statistics, value), getattr(again, value), **FLOAT32)
            assert torch.equal(statistics.category_counts, again.category_counts)


def gma_layers(model):
    return [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]


@pytest.mark.quick
@pytest.mark.parametrize("announced", [True, False])
def test_padding_does_not_count(block, announced):
    """Whether the batch's mask tells of it, or only the write weights that the model makes of another mask."""
    model = make_model(GMAForCausalLM, tiny_config(block))
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 4, dtype=torch.long)
    padded, mask = torch.cat([padding, ids], dim=1), torch.cat([padding, torch.ones_like(ids)], dim=1)
    expected = collect_statistics(model, [TokenBatch({"input_ids": ids})])
    if announced:
        measured = collect_statistics(model, [TokenBatch({"input_ids": padded, "attention_mask": mask})])
    else:
        forward = model.model.forward
        model.model.forward = lambda input_ids, **kwargs: forward(input_ids, attention_mask=mask, **kwargs)
        measured = collect_statistics(model, [TokenBatch({"input_ids": padded})])
    for name, layer in expected.items():
        for role in ("queries", "keys"):
            alone, beside = getattr(layer, role), getattr(measured[name], role)
            assert beside.num_tokens == alone.num_tokens == 18
            for value in ("usage", "entropy", "margin", "stability_bound"):
                # Padding changes float32 rounding in the layers before
                torch.testing.assert_close(getattr(beside, value), getattr(alone, value), rtol=1e-4, atol=1e-5)


def test_they_agree_with_the_reports_of_the_training():
    model = make_model(GMAForCausalLM, tiny_config())
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.layers[1].self_attn.mixture_norm.prior_logits[:, 2] = 100.0
    for name, health in measure_mixture_health(model, {"input_ids": ids}).items():
        keys = collect_statistics(model, [TokenBatch({"input_ids": ids})])[name].keys
        torch.testing.assert_close(keys.usage.float(), health.usage, **FLOAT32)
        torch.testing.assert_close(keys.usage_perplexity.float(), health.usage_perplexity, **FLOAT32)
        torch.testing.assert_close(keys.entropy.float(), health.entropy, **FLOAT32)
        assert torch.equal(keys.dead_components.sum(-1), health.dead_components)


@pytest.mark.quick
def test_bounds_are_those_of_the_derivative():
    """In float64: bound and sensitivity from autograd's Jacobian and from the g_c written out."""
    module = mixture()
    x = torch.randn(1, 2, 6, 3, dtype=torch.float64)
    found = route(module, x)
    for head in range(2):
        mean, variance = module.means[head], nn.functional.softplus(module.raw_variances[head]) + 1e-4
        for token in range(6):
            point = x[0, head, token]

            def gamma(point, head=head):
                return module.responsibilities(point.expand(1, 2, 1, 3))[0, head, 0]

            jacobian = torch.autograd.functional.jacobian(gamma, point)
            gradients = -(point - mean) / variance
            spread = (gradients - gamma(point) @ gradients).norm(dim=-1).max()
            torch.testing.assert_close(found.sensitivities[0, head, token], jacobian.norm())
            torch.testing.assert_close(found.bounds[0, head, token], spread.detach())
            largest_distance = torch.cdist(gradients, gradients).max()
            assert torch.linalg.matrix_norm(jacobian, 2) <= found.sensitivities[0, head, token] * (1 + 1e-12)
            assert found.sensitivities[0, head, token] <= found.bounds[0, head, token]
            assert found.bounds[0, head, token] <= largest_distance


@pytest.mark.quick
def test_margins_are_differences_of_log_posteriors():
    module = mixture()
    x = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    found = route(module, x)
    largest, second = module.responsibilities(x).log().topk(2, dim=-1).values.unbind(-1)
    torch.testing.assert_close(found.margins, (largest - second).detach())
    alone = route(mixture(num_components=1), x)
    assert (alone.margins == MARGIN_CAP).all() and (alone.bounds == 0).all() and (alone.sensitivities == 0).all()


def test_heads_may_share_mixtures_and_keys():
    module = mixture(num_heads=2)
    for heads in (1, 2, 4):
        x = torch.randn(2, heads, 5, 3, dtype=torch.float64)
        found = route(module, x)
        torch.testing.assert_close(found.responsibilities, module.responsibilities(x).detach())
        largest, second = module.responsibilities(x).log().topk(2, dim=-1).values.unbind(-1)
        torch.testing.assert_close(found.margins, (largest - second).detach().expand(2, max(2, heads), 5))


@pytest.mark.quick
def test_quantiles_of_margins_are_those_of_the_tokens():
    generator = torch.Generator().manual_seed(0)
    margins = torch.rand(1, 1, 4000, generator=generator).square() * 30
    gamma = torch.full((1, 1, 4000, 2), 0.5)
    statistics = RoutingStatistics()
    statistics.add(Routing(gamma, margins, margins, margins), torch.ones(1, 4000, dtype=torch.bool))
    assert statistics.margin_histogram.sum() == 4000
    for share in (0.05, 0.5, 0.95):
        expected = margins.quantile(share).item()
        # No further off than the bin is wide
        width = MARGIN_EDGES.diff()[int(torch.searchsorted(MARGIN_EDGES, expected)) - 1].item()
        assert statistics.margin_quantile(share).item() == pytest.approx(expected, abs=width)


def test_affinity_is_what_output_attentions_returns(block):
    """Also in a hybrid whose softmax layers run on a kernel that never forms theirs."""
    model = make_model(GMAForCausalLM, tiny_config(block))
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = implied_affinity(model, input_ids=ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    attentions = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    for matrix, layer in zip(found.values(), gma_layers(model), strict=True):
        # The softmax layers of a hybrid, before this one, round differently
        torch.testing.assert_close(matrix, attentions[layer].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.quick
def test_mixtures_are_found_by_type_wherever_they_stand():
    """As in a converted model, whose attention modules own one."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.gma = nn.Module()
            self.gma.mixture_norm = mixture().float()

        def forward(self, states):
            return self.gma.mixture_norm(query=states, key=states[:, :1], value=states[:, :1], causal=False)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def forward(self, pixel_values):
            for layer in self.layers:
                pixel_values = layer(pixel_values)

    pixels = torch.randn(4, 2, 7, 3)
    found = collect_statistics(Encoder(), [TokenBatch({"pixel_values": pixels})])
    assert list(found) == ["layers.0.gma.mixture_norm", "layers.1.gma.mixture_norm"]
    assert all(layer.queries.num_tokens == layer.keys.num_tokens == 4 * 7 for layer in found.values())
    for layer in found.values():
        torch.testing.assert_close(layer.keys.usage.sum(dim=-1), torch.ones(2, dtype=layer.keys.usage.dtype))
        assert layer.keys.usage.shape == (2, 5) and layer.keys.usage.std() > 0.01  # not all alike


def test_a_window_is_asked_for_the_tokens_of_the_text():
    """It hands its mixture delayed tokens and invalid ones; counted are those of the text, padding aside."""

    class Windowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture_norm, self.window_norm = mixture().float(), GMAWindow(2, 3, window_size=4)
            self.memory = GMAMemory()

        def forward(self, states, attention_mask):
            layout = Layout(*attention_mask.shape, attention_mask != 0)
            return self.memory(
                self.mixture_norm, self.window_norm, states, states, states, scaling=1.0, layout=layout
            )[0]

    model, states = Windowed(), torch.randn(2, 2, 9, 3)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    layer = collect_statistics(model, [TokenBatch({"states": states, "attention_mask": mask})])["mixture_norm"]
    expected = model.mixture_norm.responsibilities(states).transpose(1, 2)[mask != 0].mean(0).double()
    assert isinstance(layer, LayerStatistics) and layer.keys.num_tokens == 13
    for statistics in (layer.queries, layer.keys):
        torch.testing.assert_close(statistics.usage, expected.detach(), **FLOAT32)
    weights = implied_affinity(model, states=states, attention_mask=mask)["mixture_norm"]
    with torch.no_grad():
        torch.testing.assert_close(weights @ states, model(states, mask), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = make_model(GMAForMaskedLM, tiny_config(is_causal=False)).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    collect_statistics(model, [TokenBatch({"input_ids": torch.randint(3, 99, (2, 5))})])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.quick
def test_a_model_without_mixtures_is_refused():
    with pytest.raises(AnalysisError, match="Linear has no Gaussian mixture"):
        collect_statistics(nn.Linear(2, 2), [])
    with pytest.raises(AnalysisError, match="str has no Gaussian mixture"):
        collect_statistics("a name", [])
