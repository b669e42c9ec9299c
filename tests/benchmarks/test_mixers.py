# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The rivals of the benchmarks compute what they are said to compute, in models of equal size."""

import math
import tempfile

import pytest
import torch
from transformers import Mamba2Config, Trainer, TrainingArguments
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TransformersMamba2Mixer

from benchmarks.rivals import mamba2 as rival_mamba2
from benchmarks.rivals import recurrences
from benchmarks.rivals.memories import StepLinearMemory, UnitLinearMemory
from benchmarks.rivals.mixers import (
    COMPARED,
    MIXERS,
    equal_width,
    make_config,
    make_model,
    number_of_parameters,
    state_per_layer,
)
from benchmarks.rivals.recurrences import linear_attention, state_space
from gma_hf import GMAForMaskedLM, GMAForSequenceClassification


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_components": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 300,
    "pad_token_id": 0,
}
BIDIRECTIONAL = [name for name in COMPARED if MIXERS[name].only != "causal"]
CAUSAL = [name for name in COMPARED if MIXERS[name].only != "bidirectional"]
# Sums of some hundred terms of float64, whose unit is 1e-16
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def quadratic_attention(query, key, value, causal, eps=1e-6):
    scores = query @ key.transpose(-1, -2)
    if causal:
        scores = scores.tril()
    return scores @ value / (scores.sum(-1, keepdim=True) + eps)


def recurrence(x, dt, rate, B, C):
    state = torch.zeros(x.shape[0], x.shape[2], B.shape[-1], x.shape[3], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        written = B[:, t, None, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        state = torch.exp(-rate * dt[:, t])[..., None, None] * state + written
        outputs.append(torch.einsum("bn,bhnp->bhp", C[:, t], state))
    return torch.stack(outputs, dim=1)


def assert_same_with_gradients(function, definition, inputs):
    inputs = [x.requires_grad_() for x in inputs]
    outputs = [f(*inputs) for f in (function, definition)]
    torch.testing.assert_close(*outputs, **EXACT)
    direction = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, inputs, direction) for output in outputs]
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 5, 19])
def test_linear_attention_is_the_quadratic_formula(causal, length, monkeypatch):
    monkeypatch.setattr(recurrences, "CHUNK_SIZE", 4)
    torch.manual_seed(0)
    query, key = random(2, 3, length, 6).exp(), random(2, 3, length, 6).exp()
    assert_same_with_gradients(
        lambda *inputs: linear_attention(*inputs, causal=causal),
        lambda *inputs: quadratic_attention(*inputs, causal=causal),
        [query, key, random(2, 3, length, 5)],
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "length", [1, 7, 41]
)  # 41: more chunks than one block combines, and than two levels of blocks
def test_state_space_is_the_recurrence(length, monkeypatch):
    monkeypatch.setattr(recurrences, "CHUNK_SIZE", 4)
    monkeypatch.setattr(recurrences, "BLOCK_SIZE", 3)
    torch.manual_seed(0)
    dt, rate = random(2, length, 3).exp(), random(3).exp()
    assert_same_with_gradients(
        state_space, recurrence, [random(2, length, 3, 5), dt, rate, random(2, length, 6), random(2, length, 6)]
    )


def test_state_space_survives_steps_that_forget_everything():
    """A decay over a chunk far below the smallest number is zero, not NaN; also in the gradients."""
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 300, 2, 4), torch.randn(1, 300, 3), torch.randn(1, 300, 3)
    dt = torch.full((1, 300, 2), 50.0).requires_grad_()
    y = state_space(x, dt, torch.tensor([16.0, 1.0]), B, C)
    y.sum().backward()
    own = (C * B).sum(-1)[..., None, None] * 50.0 * x  # what the token itself wrote
    # Rounding of float32 (6e-8) times the some ten terms of a sum and their size, some hundreds
    torch.testing.assert_close(y, own, rtol=1e-5, atol=1e-3)
    assert torch.isfinite(dt.grad).all()


@pytest.mark.quick
def test_mamba2_is_that_of_transformers():
    torch.manual_seed(0)
    config = make_config("mamba2", **SIZES)
    own = make_model("mamba2", config).model.layers[0].self_attn
    theirs = TransformersMamba2Mixer(
        Mamba2Config(
            hidden_size=32,
            num_heads=1,
            head_dim=64,
            state_size=rival_mamba2.STATE_SIZE,
            n_groups=1,
            num_hidden_layers=1,
            chunk_size=16,
        ),
        layer_idx=0,
    )
    copies = {
        "in_proj.weight": own.in_proj.weight,
        "out_proj.weight": own.out_proj.weight,
        "conv1d.weight": own.conv_weight[:, None],
        "conv1d.bias": own.conv_bias,
        "dt_bias": own.dt_bias,
        "A_log": own.A_log_bias,
        "D": own.D_bias,
        "norm.weight": own.norm.weight,
    }
    theirs.load_state_dict({name: value.detach() for name, value in copies.items()})
    hidden_states = torch.randn(2, 150, 32)
    output, expected = own(hidden_states)[0], theirs(hidden_states)
    expected = expected[0] if isinstance(expected, tuple) else expected
    # Both in float32: some hundred roundings of 6e-8
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)


def test_random_features_estimate_the_softmax_kernel():
    """The mean of phi(q).phi(k) over many features is exp(q.k / sqrt(d)), up to the stabilisers, which cancel in ratios."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 16, "num_attention_heads": 1, "num_components": 200_000}
    attention = make_model("performer", make_config("performer", **sizes)).model.layers[0].self_attn
    query, key = 0.3 * torch.randn(1, 1, 6, 16), 0.3 * torch.randn(1, 1, 6, 16)
    features = attention.memory.features
    query_features, key_features = features(query, True, None), features(key, False, None)
    weights = torch.nn.functional.normalize(query_features @ key_features.transpose(-1, -2), p=1, dim=-1)
    # The product of one feature deviates by sqrt(exp(|q + k|^2) - 1), about 2, that of 200,000 by 0.5%; five times that,
    # and what the queries' 1e-4 adds
    torch.testing.assert_close(weights, torch.softmax(query @ key.transpose(-1, -2) / 4, dim=-1), rtol=0.03, atol=0)


def test_random_features_are_orthogonal_and_as_long_as_gaussian_vectors():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_components": 16}
    projection = make_model("performer", make_config("performer", **sizes)).model.layers[0].self_attn.memory.projection
    for block in projection.split(8):  # heads of 8
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-4)
    assert projection.norm(dim=-1).std() > 0.1


@pytest.mark.quick
@pytest.mark.parametrize("mixer", CAUSAL)
def test_language_models_do_not_see_the_future(mixer):
    torch.manual_seed(0)
    model = make_model(mixer, make_config(mixer, **SIZES)).eval()
    tokens = torch.randint(1, 50, (2, 200))
    other = tokens.clone()
    other[:, 150:] = torch.randint(1, 50, (2, 50))
    with torch.no_grad():
        logits, other_logits = model(tokens).logits, model(other).logits
    # The stabiliser of Performer's keys looks ahead and cancels but for rounding
    torch.testing.assert_close(logits[:, :150], other_logits[:, :150], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[:, 150:], other_logits[:, 150:], atol=1e-3)


def logits_of_padded_and_alone(model, tokens, side):
    """A row of 23 tokens, padded beside one of 32, and the same alone."""
    short, long = tokens[:1, :23], tokens[1:]
    padding = torch.zeros(1, 9, dtype=torch.long)
    padded = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    mask = (torch.cat([padded, long]) != 0).long()
    with torch.no_grad():
        return model(torch.cat([padded, long]), attention_mask=mask).logits[:1], model(short).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixer", BIDIRECTIONAL)
def test_padding_changes_nothing_in_an_encoder(mixer, side):
    torch.manual_seed(0)
    config = make_config(mixer, is_causal=False, num_labels=3, **SIZES)
    model = make_model(mixer, config, GMAForSequenceClassification).eval()
    tokens = torch.randint(1, 50, (2, 32))
    if mixer == "linformer" and side == "left":
        with pytest.raises(ValueError, match="pad on the right"):
            logits_of_padded_and_alone(model, tokens, side)
        return
    logits, expected = logits_of_padded_and_alone(model, tokens, side)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixer", CAUSAL)
def test_padding_changes_nothing_in_a_language_model(mixer, side):
    torch.manual_seed(0)
    model = make_model(mixer, make_config(mixer, **SIZES)).eval()
    logits, expected = logits_of_padded_and_alone(model, torch.randint(1, 50, (2, 32)), side)
    logits = logits[:, 9:] if side == "left" else logits[:, :23]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_sees_both_sides():
    torch.manual_seed(0)
    for mixer in BIDIRECTIONAL:
        model = make_model(mixer, make_config(mixer, is_causal=False, **SIZES), GMAForMaskedLM).eval()
        tokens = torch.randint(1, 50, (1, 20))
        other = tokens.clone()
        other[:, -1] = (tokens[:, -1] + 1) % 50
        with torch.no_grad():
            assert not torch.allclose(model(tokens).logits[:, 0], model(other).logits[:, 0], atol=1e-7), mixer


@pytest.mark.parametrize("mixer", CAUSAL)
def test_sizes_agree_within_three_percent(mixer):
    """At the sizes of the language models, with Mamba-2, which cannot be adapted, as the reference."""
    sizes = {**SIZES, "vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    sizes["num_components"] = 64
    width = equal_width(mixer, sizes, "mamba2", sizes)
    counts = [number_of_parameters("mamba2", **sizes)]
    counts.append(number_of_parameters(mixer, **{**sizes, "intermediate_size": width}))
    assert math.isclose(*counts, rel_tol=0.01)
    assert width % 8 == 0


def test_a_model_without_mlp_cannot_be_made_equal():
    with pytest.raises(ValueError, match="reference"):
        equal_width("mamba2", SIZES, "softmax", {**SIZES, "intermediate_size": 2048})


def test_mixers_refuse_what_they_cannot_be():
    for mixer in ("mamba2", "gated_delta_net"):
        with pytest.raises(ValueError, match="causal only"):
            make_config(mixer, is_causal=False, **SIZES)
    with pytest.raises(ValueError, match="bidirectional only"):
        make_config("linformer", **SIZES)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["linear_gated", "step_gated"])
def test_gated_linear_attention_is_the_recurrence(name):
    """Per head: S_t = a_t S_{t-1} + w_t k_t v_t^T and o_t = S_t^T q_t, with unit q and k, or with the step as w."""
    torch.manual_seed(0)
    memory = make_model(name, make_config(name, **SIZES)).model.layers[0].self_attn.memory
    assert type(memory) is {"linear_gated": UnitLinearMemory, "step_gated": StepLinearMemory}[name]
    query, key, value = (random(2, 37, 4, 8) for _ in range(3))
    step = random(2, 37, 4).exp()
    log_decay = -0.3 * step
    states, rate = (x.transpose(1, 2) for x in (query, key, value)), torch.full((4, 1), -0.3, dtype=torch.float64)
    output = memory(None, None, *states, write_weight=step.transpose(1, 2), decay_rate=rate)[0].transpose(1, 2)
    if name == "linear_gated":
        query, key = (x.float().double() for x in (query, key))
        query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
        step = torch.ones_like(step)
    state, expected = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
    for t in range(37):
        written = key[:, t, :, :, None] * (step[:, t, :, None] * value[:, t])[:, :, None]
        state = log_decay[:, t].exp()[..., None, None] * state + written
        expected.append(torch.einsum("bhn,bhnd->bhd", query[:, t], state))
    # Unit vectors are made in float32
    torch.testing.assert_close(output, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_gated_softmax_attention_is_that_of_rotated_queries_and_keys():
    """The layer rotates, and the memory is softmax attention: written out, with the first layer's own projections."""
    torch.manual_seed(0)
    model = make_model("softmax_gated", make_config("softmax_gated", **{**SIZES, "num_hidden_layers": 1})).eval()
    layer, seen = model.model.layers[0], {}
    layer.self_attn.memory.register_forward_hook(
        lambda module, args, output: seen.update(states=args[2:], output=output[0])
    )
    layer.self_attn.conv.register_forward_hook(lambda module, args, output: seen.update(mixed=output[0]))
    with torch.no_grad():
        model(torch.randint(1, 50, (1, 30)))
    query, key, value = (x.double() for x in seen["states"])
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(
        ~torch.ones(30, 30, dtype=torch.bool).tril(), -math.inf
    )
    torch.testing.assert_close(seen["output"].double(), scores.softmax(dim=-1) @ value, rtol=1e-5, atol=1e-6)
    # Rotation by position times theta^(-i / 4) in pairs of dimensions i and i + 4
    unrotated = torch.view_as_complex(torch.stack(seen["mixed"][0, :, :8].double().chunk(2, dim=-1), dim=-1))
    angles = torch.arange(30)[:, None] * model.config.rope_parameters["rope_theta"] ** -(torch.arange(4) / 4)
    rotated = unrotated * torch.polar(torch.ones_like(angles).double(), angles.double())
    torch.testing.assert_close(query[0, 0], torch.cat([rotated.real, rotated.imag], dim=-1), rtol=1e-4, atol=1e-6)


@pytest.mark.quick
def test_linformer_reads_shortened_keys_and_values():
    torch.manual_seed(0)
    config = make_config("linformer", is_causal=False, **SIZES)
    attention = make_model("linformer", config, GMAForMaskedLM).base_model.layers[0].self_attn
    x = torch.randn(1, 20, 32)
    query, key, value = (
        proj(x)[0].view(20, 4, 8).transpose(0, 1) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    key, value = (attention.memory.shorten[:, :20] @ states for states in (key, value))
    assert key.shape == (4, 8, 8)  # as many rows as there are components
    expected = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, dim=-1) @ value
    expected = attention.o_proj(expected.transpose(0, 1).reshape(1, 20, 32))
    torch.testing.assert_close(attention(x, is_causal=False)[0], expected, rtol=1e-4, atol=1e-6)


def test_the_state_is_what_a_layer_keeps():
    """Numbers of the recall experiment: width 128, heads of 64."""
    sizes = {**SIZES, "hidden_size": 128, "num_attention_heads": 2, "num_components": 64}
    states = {mixer: state_per_layer(mixer, make_config(mixer, **sizes)) for mixer in CAUSAL}
    assert states["softmax"] is states["softmax_gated"] is states["hybrid"] is None
    assert (
        states["gma_gated"]
        == states["gma_paper"]
        == states["gma_correlated"]
        == states["elu"]
        == states["performer"]
        == 2 * 64 * 65
    )
    assert states["linear_gated"] == states["step_gated"] == states["gated_delta_net"] == 2 * 64 * 64
    # Four heads of 64 with a state of 128, in two blocks for one
    assert states["mamba2"] == 2 * 4 * 64 * 128


def test_rivals_refuse_what_they_would_ignore():
    model = make_model("elu", make_config("elu", **SIZES)).eval()
    tokens = torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="packed"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="cache"):
        model(tokens, use_cache=True)
    with pytest.raises(ValueError, match="padding between real tokens"):
        model(tokens, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))


def test_weight_decay_spares_what_is_no_matrix():
    for mixer in ("elu", "performer", "mamba2", "linear_gated"):
        model = make_model(mixer, make_config(mixer, **SIZES))
        with tempfile.TemporaryDirectory() as folder:
            decayed = Trainer(model, TrainingArguments(folder, use_cpu=True)).get_decay_parameter_names(model)
        assert all(model.get_parameter(name).ndim >= 2 for name in decayed), decayed
        assert len(decayed) > 8


@pytest.mark.quick
def test_variants_of_the_search_differ_from_their_block_as_their_names_say():
    torch.manual_seed(0)
    made = {name: make_model(name, make_config(name, **SIZES)) for name, mixer in MIXERS.items() if mixer.is_variant}
    # Rivals with a projection of their own; Mamba-2 has one residual a block, in twice as many blocks
    for name, path in {"mamba2_quiet": "out_proj", "delta_quiet": "net.out_proj"}.items():
        weight = made.pop(name).model.layers[0].self_attn.get_submodule(path).weight
        assert weight.std().item() == pytest.approx(0.01, rel=0.1), name
    for index, layer in enumerate(made.pop("alternating").model.layers):
        module = layer.self_attn
        assert module.mixture_norm.correlate == hasattr(module, "q_norm") == (index % 2 == 1)
        assert torch.equal(module.q_proj.weight, module.k_proj.weight) == (index % 2 == 1)
        assert module.o_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)
    attention = {name: model.model.layers[0].self_attn for name, model in made.items()}
    correlated = {"correlated_normal", "correlated_weight_one", "delta_normal"}
    tied = {"correlated_loud", "correlated_raw", "correlated_narrow", "linear_quiet", *correlated}
    loud = {"correlated_loud", "gated_eps"}
    for name, module in attention.items():
        assert torch.equal(module.q_proj.weight, module.k_proj.weight) == (name in tied), name
        # 1,024 draws with the deviation 0.02, divided by sqrt(2 layers) = 2 in a quiet start
        deviation = 0.02 if name in loud else 0.01
        assert module.o_proj.weight.std().item() == pytest.approx(deviation, rel=0.1), name
    assert attention["gated_eps"].o_norm.variance_epsilon == 1e-5
    assert attention["step_quiet"].o_norm.variance_epsilon == attention["linear_quiet"].o_norm.variance_epsilon == 1e-4
    assert make_config("correlated_narrow", **SIZES).variance_init == 3.0
    assert not make_config("correlated_raw", **SIZES).use_qk_norm
