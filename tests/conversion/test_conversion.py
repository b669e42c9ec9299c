# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What `convert_to_gma` promises besides the architectures: which layers, what it leaves alone, and what it refuses."""

import copy
from pathlib import Path

import pytest
import torch
import transformers

import gma_hf
from gma_hf import convert_to_gma, gma_layers, revert_to_softmax, supported_architectures
from tests.conversion.tiny_models import (
    FAMILIES,
    SIZES,
    make_converted_model,
    make_inputs,
    make_softmax_model,
    output_of,
    perturb,
)


SIX_LAYERS = {"num_hidden_layers": 6}


@pytest.fixture
def tokens():
    return make_inputs("llama")["input_ids"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"layers": [4, 1]}, [1, 4]),
        ({"layers": [-1]}, [5]),
        ({"layers": 0.5}, [1, 3, 5]),
        ({"layers": 0.34}, [2, 5]),
        ({"keep_every": 3}, [0, 1, 3, 4]),
        ({"layers": range(1, 6), "keep_every": 2}, [1, 3, 5]),
        ({"layers": ["layers.2", "model.layers.3.self_attn"]}, [2, 3]),
        ({"layers": "layers.1"}, [1]),
    ],
)
def test_which_layers_are_converted(options, converted):
    model = convert_to_gma(make_softmax_model("llama", **SIX_LAYERS), num_components=6, **options)
    assert list(gma_layers(model)) == [f"model.layers.{index}.self_attn" for index in converted]


@pytest.mark.quick
def test_encoder_and_decoder_are_chosen_by_name():
    model = convert_to_gma(make_softmax_model("bart"), layers=["decoder"])
    assert list(gma_layers(model)) == [f"model.decoder.layers.{index}.self_attn" for index in (0, 1)]
    model = convert_to_gma(make_softmax_model("bart"), layers=[0, 3])
    assert list(gma_layers(model)) == ["model.encoder.layers.0.self_attn", "model.decoder.layers.1.self_attn"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "No layer is left"),
        ({"layers": [0], "keep_every": 1}, "`keep_every` must be at least 2"),
        ({"layers": [2]}, "the model has 2 self-attention layers. Give indices from -2 to 1"),
        ({"layers": [True]}, "the model has 2 self-attention layers"),
        ({"layers": 3}, "Give a list of indices, `\\[3\\]`"),
        ({"layers": 1.5}, "must lie in \\(0, 1\\]"),
        ({"layers": ["encoder"]}, "Their names are: layers.0.self_attn, layers.1.self_attn"),
        ({"num_components": 0}, "`num_components` must be positive"),
        ({"window_size": -1}, "`window_size` must not be negative"),
        ({"window_size": 4, "num_sink_tokens": -1}, "`num_sink_tokens` must not be negative"),
        ({"num_sink_tokens": 1}, "`window_size` is 0, but sink tokens need a window"),
        ({"variance_init": 1e-5}, "must exceed `variance_floor`"),
    ],
)
def test_impossible_options_are_refused_and_leave_the_model_alone(options, message, tokens):
    model = make_softmax_model("llama")
    config, expected = model.config, output_of(model, input_ids=tokens)
    with pytest.raises(ValueError, match=message):
        convert_to_gma(model, **options)
    assert type(model) is transformers.LlamaForCausalLM and model.config is config
    assert torch.equal(output_of(model, input_ids=tokens), expected)


@pytest.mark.quick
def test_models_that_cannot_be_converted_are_refused_with_the_reason():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match=r"t5 model cannot be converted: it adds relative position biases.*llama"):
        convert_to_gma(t5)
    mamba = transformers.MambaModel(transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="it has no attention"):
        convert_to_gma(mamba)
    old = transformers.XLMModel(transformers.XLMConfig(vocab_size=9, emb_dim=8, n_layers=1, n_heads=2))
    with pytest.raises(ValueError, match="does not compute its attention through Transformers' attention interface"):
        convert_to_gma(old)
    with pytest.raises(ValueError, match="takes a model of Transformers, got Linear"):
        convert_to_gma(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`revert_to_softmax\\(model\\)` first"):
        convert_to_gma(make_converted_model("llama"))
    with pytest.raises(ValueError, match="nothing to revert"):
        revert_to_softmax(make_softmax_model("llama"))
    with pytest.raises(ValueError, match="no order in which to forget"):
        convert_to_gma(make_softmax_model("bert"), use_forgetting=True)
    with pytest.raises(ValueError, match="`num_sink_tokens` needs causal layers"):
        convert_to_gma(make_softmax_model("bert"), window_size=4, num_sink_tokens=1)


def test_biases_are_seen_where_the_table_says_nothing(monkeypatch):
    """A position bias that reaches the attention function is an obstacle, whatever the model is called."""
    monkeypatch.setattr(gma_hf.conversion.convert, "check_architecture", lambda model: None)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, pad_token_id=0)
    )
    with pytest.raises(ValueError, match="cannot be converted: it adds a position bias"):
        convert_to_gma(t5)


@pytest.mark.quick
def test_inputs_for_the_probe_may_be_given(tokens):
    model = make_softmax_model("llama")
    with pytest.raises(ValueError, match="Give arguments that it takes as `example_inputs`"):
        convert_to_gma(model, example_inputs={"pixel_values": tokens})
    assert type(model) is transformers.LlamaForCausalLM
    convert_to_gma(model, example_inputs={"inputs_embeds": torch.zeros(1, 4, 32)})
    assert len(gma_layers(model)) == 2


@pytest.mark.quick
def test_the_table_names_what_is_tested():
    table = {row.model_type: row for row in supported_architectures()}
    assert len(table) == len(supported_architectures())
    assert {row.model_type for row in table.values() if row.tested} == set(FAMILIES) | {"siglip"}
    assert all(row.notes and not row.tested for row in table.values() if row.kind == "refused")
    known = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES) | {"gma"}
    assert set(table) <= known


@pytest.mark.quick
def test_a_teacher_that_shares_the_configuration_stays_what_it_is(tokens):
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(0)
    teacher, student = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    before = output_of(teacher, input_ids=tokens)
    perturb(convert_to_gma(student, num_components=6))
    assert teacher.config is config and config.model_type == "llama" and not hasattr(config, "gma")
    assert torch.equal(output_of(teacher, input_ids=tokens), before)
    assert not torch.equal(output_of(student, input_ids=tokens), before)


@pytest.mark.quick
def test_conversion_keeps_mode_dtype_and_gradients():
    model = make_softmax_model("llama").to(torch.bfloat16).train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    convert_to_gma(model)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert not model.model.layers[0].self_attn.gma.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for layer in gma_layers(model).values() for p in layer.parameters())


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, {"layers": [1]}], ids=["all", "hybrid"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "gma"])
def test_converted_layers_stay_gma_whatever_softmax_is_asked_for(options, implementation, tokens, tmp_path):
    model = make_converted_model("llama", **options)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    expected = output_of(model, input_ids=tokens, attention_mask=mask)[mask == 1]
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    for one in (model, loaded):
        output = output_of(one, input_ids=tokens, attention_mask=mask)[mask == 1]
        # Softmax layers differ by the order of their sums
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    revert_to_softmax(model)
    assert model.config._attn_implementation == ("sdpa" if implementation == "gma" else implementation)


@pytest.mark.quick
def test_an_unknown_softmax_is_refused_and_changes_nothing(tokens):
    model = make_converted_model("llama")
    expected = output_of(model, input_ids=tokens)
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    assert torch.equal(output_of(model, input_ids=tokens), expected)


@pytest.mark.quick
def test_a_model_that_was_not_converted_cannot_run_gma(tokens):
    model = make_softmax_model("llama")
    model.set_attn_implementation("gma")
    with pytest.raises(ValueError, match="has no mixtures"):
        model(tokens)


@pytest.mark.quick
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "vit", "bart"])
@pytest.mark.parametrize("options", [{}, {"window_size": 3}], ids=["plain", "windowed"])
def test_attentions_are_the_implied_affinities(model_type, options):
    model, inputs = make_converted_model(model_type, **options), make_inputs(model_type)
    arguments = {"output_attentions": True, "use_cache": False}
    outputs = model(**inputs, **(arguments if model_type != "vit" else {"output_attentions": True}))
    name = "decoder_attentions" if model_type == "bart" else "attentions"
    attentions = outputs[name]
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape[1] == 4 and weights.shape[2] == weights.shape[3]
        assert (weights >= 0).all()
        # Rows sum to d / (d + eps): d is at least the smallest overlap of two random distributions over 6 components
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-3)
        if list(gma_layers(model).values())[-1].is_causal:
            assert not weights.triu(1).any()
    expected = output_of(model, **inputs)
    torch.testing.assert_close(outputs.logits, expected)


@pytest.mark.quick
def test_a_hook_on_the_mixtures_sees_what_is_routed(tokens):
    """
    In every configuration, by keyword or not: what calibration is built on. Behind a window the first tokens find nothing in
    the memory, and the last ones are not in it yet.
    """
    for options in (
        {},
        {"window_size": 3},
        {"window_size": 3, "num_sink_tokens": 2},
        {"use_routing_projections": True},
    ):
        model = make_converted_model("llama", **options)
        seen = []
        for layer in gma_layers(model).values():
            layer.mixture_norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[:2]))
        output_of(model, input_ids=tokens)
        routed = 13 - options.get("window_size", 0) - options.get("num_sink_tokens", 0)
        assert [tuple(query.shape) for query, _ in seen] == [(2, 4, routed, 8)] * 2
        assert [tuple(key.shape) for _, key in seen] == [(2, 2, routed, 8)] * 2


@pytest.mark.quick
def test_wide_conversions_equal_narrow_ones_where_they_add_nothing(tokens):
    """Routing maps start as identities, and a window of one token with a silent memory is that token alone."""
    plain = make_softmax_model("llama")
    torch.manual_seed(5)
    convert_to_gma(plain, num_components=6)
    routed = make_softmax_model("llama")
    torch.manual_seed(5)
    convert_to_gma(routed, num_components=6, use_routing_projections=True)
    assert torch.equal(output_of(plain, input_ids=tokens), output_of(routed, input_ids=tokens))

    softmax = make_softmax_model("llama")
    windowed = convert_to_gma(make_softmax_model("llama"), num_components=6, window_size=64)
    # The window covers everything: softmax attention itself, in other words
    torch.testing.assert_close(
        output_of(windowed, input_ids=tokens), output_of(softmax, input_ids=tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.quick
@pytest.mark.parametrize("options", [{"window_size": 64}, {"window_size": 9, "num_sink_tokens": 4}])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_a_window_over_everything_is_the_original_attention(model_type, options):
    """Soft-capping and attention sinks are part of the window; and the last tokens and the first are all of them."""
    softmax = make_softmax_model(model_type, sliding_window=64)
    softmax.set_attn_implementation("eager")
    windowed = convert_to_gma(copy.deepcopy(softmax), num_components=6, **options)
    inputs = make_inputs(model_type)
    torch.testing.assert_close(output_of(windowed, **inputs), output_of(softmax, **inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_sink_tokens_belong_to_causal_layers():
    """An encoder beside them has none, as it has no forgetting."""
    model = make_converted_model("bart", window_size=3, num_sink_tokens=2)
    for name, layer in gma_layers(model).items():
        assert layer.window_norm.num_sink_tokens == (2 if "decoder" in name else 0)
    plain = make_converted_model("bart", window_size=3)
    plain.load_state_dict(model.state_dict())
    source = make_inputs("bart")
    encoded = [one.get_encoder()(source["input_ids"])[0] for one in (model, plain)]
    assert torch.equal(*encoded)
    assert not torch.equal(output_of(model, **source), output_of(plain, **source))


@pytest.mark.quick
def test_the_documentation_shows_the_table():
    document = (Path(__file__).resolve().parents[2] / "docs" / "conversion.md").read_text(encoding="utf-8")
    refusals = document.split("These are refused")[1]
    for row in supported_architectures():
        if row.tested:
            assert f"| `{row.model_type}` | {row.kind} | {row.notes} |" in document
        else:
            (line,) = (line for line in refusals.splitlines() if f"`{row.model_type}`" in line)
            assert line.endswith(f"| {row.notes} |")
