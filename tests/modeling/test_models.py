# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The models behave as every model of Transformers does."""

import inspect

import pytest
import torch
import transformers

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMAMixture
from tests.conftest import HYBRID_LAYERS, TINY, make_model, tiny_config


HEADS = {
    "AutoModel": gma_hf.GMAModel,
    "AutoModelForCausalLM": gma_hf.GMAForCausalLM,
    "AutoModelForMaskedLM": gma_hf.GMAForMaskedLM,
    "AutoModelForSequenceClassification": gma_hf.GMAForSequenceClassification,
    "AutoModelForTokenClassification": gma_hf.GMAForTokenClassification,
    "AutoModelForQuestionAnswering": gma_hf.GMAForQuestionAnswering,
}
LABELS = {
    gma_hf.GMAForCausalLM: lambda tokens: {"labels": tokens},
    gma_hf.GMAForMaskedLM: lambda tokens: {"labels": tokens},
    gma_hf.GMAForSequenceClassification: lambda tokens: {"labels": tokens[:, 0] % 2},
    gma_hf.GMAForTokenClassification: lambda tokens: {"labels": tokens % 2},
    gma_hf.GMAForQuestionAnswering: lambda tokens: {
        "start_positions": tokens[:, 0] % 5,
        "end_positions": tokens[:, 1] % 5,
    },
}


@pytest.mark.quick
@pytest.mark.parametrize("auto_name", HEADS)
def test_auto_classes_build_save_and_load(auto_name, tokens, tmp_path):
    auto_class, model_class = getattr(transformers, auto_name), HEADS[auto_name]
    is_causal = auto_name != "AutoModelForMaskedLM"
    model = auto_class.from_config(tiny_config("gated", is_causal=is_causal)).eval()
    assert type(model) is model_class
    model.save_pretrained(tmp_path)
    reloaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is model_class
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(tokens)[0], model(tokens)[0], rtol=0, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("model_class", LABELS)
def test_every_parameter_learns(model_class, block, tokens):
    config = tiny_config(block, is_causal=model_class is gma_hf.GMAForCausalLM)
    model = make_model(model_class, config).train()
    loss = model(tokens, **LABELS[model_class](tokens)).loss
    loss.backward()
    # The last position of a learned table is never used here, but the table as a whole is
    without_gradient = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    if model_class is gma_hf.GMAForQuestionAnswering and "qa_outputs.bias" in without_gradient:
        # The softmax over positions does not see what is added at all of them: only rounding gives this bias a gradient
        without_gradient.remove("qa_outputs.bias")
    assert torch.isfinite(loss) and without_gradient == []


@pytest.mark.quick
def test_initialisation_is_what_the_configuration_says():
    config = tiny_config("gated", num_components=64, mean_init_std=2.0, variance_init=0.3, hidden_size=64)
    attention = gma_hf.GMAModel(config).layers[0].self_attn
    mixture = attention.mixture_norm
    # 4 heads x 64 components x 16 dimensions = 4096 draws: the standard error of their deviation is 2 / sqrt(8192)
    assert abs(mixture.means.std().item() - 2.0) < 5 * 2.0 / 8192**0.5
    variances = torch.nn.functional.softplus(mixture.raw_variances) + config.variance_floor
    torch.testing.assert_close(variances, torch.full_like(variances, 0.3))
    at_origin = mixture.responsibilities(torch.zeros(1, 4, 1, 16))
    torch.testing.assert_close(at_origin, torch.full_like(at_origin, 1 / 64))
    steps = torch.nn.functional.softplus(attention.dt_bias)
    assert (steps >= config.time_step_min * 0.999).all() and (steps <= config.time_step_max * 1.001).all()
    rates = attention.A_log_bias.exp()
    assert (rates >= 0.999).all() and (rates <= 16.001).all()


@pytest.mark.quick
def test_the_papers_mixtures_start_with_equal_priors():
    assert not gma_hf.GMAModel(tiny_config("paper")).layers[0].self_attn.mixture_norm.prior_logits.any()


@pytest.mark.quick
@pytest.mark.quick
@pytest.mark.parametrize("preset", ["paper", "gated"])
def test_a_quiet_start_does_not_depend_on_the_other_options(preset, tmp_path):
    """Layers of the paper's block have no parameters of their own, and start as they are told all the same; loaded ones stay."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "tie_qk_init": True, "scale_output_init": True}
    model = gma_hf.GMAForCausalLM(tiny_config(preset, **sizes))
    for layer in model.model.layers:
        attention = layer.self_attn
        assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
        # 4,096 draws with the deviation 0.02 / sqrt(2 * 2 layers), which has an error of 1.1%
        assert attention.o_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
        torch.nn.init.normal_(attention.k_proj.weight)
    model.save_pretrained(tmp_path)
    loaded = gma_hf.GMAForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_tied_embeddings_stay_tied(tmp_path):
    model = gma_hf.GMAForCausalLM(tiny_config())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape[0] == 120
    model.save_pretrained(tmp_path)
    reloaded = gma_hf.GMAForCausalLM.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight and reloaded.config.vocab_size == 120
    untied = gma_hf.GMAForCausalLM(tiny_config(tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.quick
def test_inputs_embeds_equal_input_ids(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    embeds = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(tokens).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids=tokens, inputs_embeds=embeds)


@pytest.mark.quick
def test_hidden_states_and_attentions(block, tokens):
    config = tiny_config(block)
    config._attn_implementation = "eager"
    model = make_model(gma_hf.GMAForCausalLM, config)
    outputs = model(tokens, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    for attention in outputs.attentions:
        assert attention.shape == (2, 4, 19, 19)
        # The row of a token differs from what any other token pays attention to
        assert attention.isfinite().all() and attention.diagonal(dim1=-2, dim2=-1).abs().min() > 0
        assert not attention.triu(1).any()
        assert config.correlate == bool((attention < 0).any())
    if config.normalize_read and not config.use_write_weight:
        # Row sums are d / (d + eps), where d is at least the weight 1 times the overlap of a token's two routes
        rows = outputs.attentions[0].sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-3)


@pytest.mark.quick
def test_attentions_times_values_is_the_output_of_the_head():
    """What `output_attentions` shows is what the layer computes."""
    model = make_model(gma_hf.GMAModel, tiny_config("paper"))
    attention = model.layers[0].self_attn
    seen = {}
    attention.mixture_norm.register_forward_hook(
        lambda module, args, output: seen.update(value=args[2], output=output)
    )
    hidden_states = torch.randn(2, 11, 32)
    _, weights = attention(hidden_states, output_attentions=True)
    torch.testing.assert_close(weights @ seen["value"], seen["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_attentions_that_cannot_be_had_are_refused_with_the_way_out(tokens):
    hybrid = make_model(gma_hf.GMAForCausalLM, tiny_config("hybrid"))
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        hybrid(tokens, output_attentions=True)
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens, **{CACHE_NAME: cache}, output_attentions=True)


@pytest.mark.quick
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_reaches_the_softmax_layers(implementation, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("hybrid"))
    expected = model(tokens).logits
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_flex_attention_agrees_on_padded_and_packed_batches(tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("hybrid", head_dim=16))  # it wants at least 16
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
    # PyTorch's flex attention has no backward pass on the CPU; uncompiled it needs no C++ compiler
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        padded, packed = model(tokens, attention_mask=mask).logits, model(tokens, position_ids=positions).logits
        model.set_attn_implementation("flex_attention")
        logits = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask == 1], padded[mask == 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(tokens, position_ids=positions).logits, packed, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_arguments_come_in_the_order_of_other_models():
    for ours, theirs in (
        (gma_hf.GMAModel, transformers.LlamaModel),
        (gma_hf.GMAForCausalLM, transformers.LlamaForCausalLM),
        (gma_hf.GMAForSequenceClassification, transformers.LlamaForSequenceClassification),
    ):
        assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)


@pytest.mark.quick
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block)).train()
    model(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.quick
def test_loss_is_right_under_gradient_accumulation(tokens):
    """Two micro-batches of different length, told the number of items in the whole batch, add up to its mean."""
    model = make_model(gma_hf.GMAForCausalLM, tiny_config())
    labels = tokens.clone()
    labels[0, 10:] = -100
    num_items = (labels[:, 1:] != -100).sum()
    whole = model(tokens, labels=labels).loss
    parts = [
        model(tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=num_items).loss
        for row in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_state_in_float32(dtype, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    expected = model(tokens).logits
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(tokens, labels=tokens, use_cache=True)
    outputs.loss.backward()
    for layer in outputs[CACHE_NAME].layers:
        assert all(state.dtype == torch.float32 for state in layer.state)
    # 16-bit projections: a few units in the last place of bfloat16 (2^-8) relative to the scale of the logits
    assert (outputs.logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.quick
def test_autocast_gives_the_mixtures_the_16_bits_that_it_gives_softmax(block, tokens):
    """Norms and angles make float32 of queries and keys again; kernels for 16 bits would refuse the mixed types."""
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    seen = []
    mixtures = [module for module in model.modules() if isinstance(module, GMAMixture)]
    for mixture in mixtures:
        mixture.register_forward_pre_hook(lambda module, states: seen.extend(states))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert len(seen) == 3 * len(mixtures) and {x.dtype for x in seen} == {torch.bfloat16}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.quick
def test_low_precision_models_stay_close(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    expected = model(tokens).logits
    for dtype in (torch.bfloat16, torch.float16):
        logits = model.to(dtype)(tokens).logits.float()
        assert logits.isfinite().all()
        assert (logits - expected).norm() < 0.05 * expected.norm()
        model.float()


@pytest.mark.quick
def test_classification_pools_the_last_real_token_or_the_mean():
    tokens = torch.tensor([[5, 6, 7, 0, 0], [0, 8, 9, 10, 11]])
    mask = (tokens != 0).long()
    causal = make_model(gma_hf.GMAForSequenceClassification, tiny_config("gated"))
    states = causal.model(tokens, attention_mask=mask).last_hidden_state
    expected = causal.score(torch.stack([states[0, 2], states[1, 4]]))
    torch.testing.assert_close(causal(tokens, attention_mask=mask).logits, expected)

    encoder = make_model(gma_hf.GMAForSequenceClassification, tiny_config("gated", is_causal=False))
    states = encoder.model(tokens, attention_mask=mask).last_hidden_state
    expected = encoder.score(torch.stack([states[0, :3].mean(0), states[1, 1:].mean(0)]))
    torch.testing.assert_close(encoder(tokens, attention_mask=mask).logits, expected)


@pytest.mark.quick
@pytest.mark.parametrize("problem_type", ["regression", "single_label_classification", "multi_label_classification"])
def test_classification_problem_types(problem_type, tokens):
    num_labels = 1 if problem_type == "regression" else 3
    config = tiny_config("gated", num_labels=num_labels, problem_type=problem_type)
    model = make_model(gma_hf.GMAForSequenceClassification, config)
    labels = {
        "regression": torch.tensor([0.5, -1.0]),
        "single_label_classification": torch.tensor([2, 0]),
        "multi_label_classification": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    }[problem_type]
    assert torch.isfinite(model(tokens, labels=labels).loss)


@pytest.mark.quick
def test_a_bidirectional_language_model_is_refused():
    with pytest.raises(ValueError, match="Use GMAForMaskedLM"):
        gma_hf.GMAForCausalLM(tiny_config("paper", is_causal=False))


@pytest.mark.quick
def test_a_causal_model_does_not_look_ahead(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    changed = tokens.clone()
    changed[:, 12:] = 5
    torch.testing.assert_close(model(changed).logits[:, :12], model(tokens).logits[:, :12], rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_an_encoder_sees_everything(tokens):
    model = make_model(gma_hf.GMAModel, tiny_config("hybrid", is_causal=False))
    changed = tokens.clone()
    changed[:, -1] = 5
    difference = (model(changed)[0] - model(tokens)[0]).abs().amax(dim=-1)
    # Every token of both rows sees the last one: far more than the rounding of float32, some 1e-6
    assert difference.min() > 1e-4


@pytest.mark.quick
def test_learned_positions_say_where_they_end(tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("paper", max_position_embeddings=16))
    with pytest.raises(ValueError, match="learned only 16 positions"):
        model(tokens)
    model(tokens[:, :16])


@pytest.mark.quick
def test_rope_scaling_types_of_transformers_work(tokens):
    for rope_parameters in (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ):
        config = tiny_config("paper", position_embedding_type="rope", rope_parameters=rope_parameters)
        plain = tiny_config("paper", position_embedding_type="rope")
        scaled, unscaled = (make_model(gma_hf.GMAForCausalLM, c)(tokens).logits for c in (config, plain))
        assert scaled.isfinite().all()
        # Dynamic scaling begins behind the original length, which 19 tokens do not reach
        assert torch.allclose(scaled, unscaled, atol=1e-6) == (rope_parameters["rope_type"] == "dynamic")


@pytest.mark.quick
def test_dropout_acts_in_training_only(tokens):
    config = tiny_config("hybrid", hidden_dropout=0.3, attention_dropout=0.3, classifier_dropout=0.3)
    model = make_model(gma_hf.GMAForSequenceClassification, config)
    mask = torch.ones_like(tokens)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits, model(tokens, attention_mask=mask).logits)
    model.train()
    assert not torch.equal(model(tokens, attention_mask=mask).logits, model(tokens, attention_mask=mask).logits)


@pytest.mark.quick
def test_an_all_softmax_model_is_possible(tokens):
    """The baseline of our own comparisons."""
    config = tiny_config("gated", layer_types=["full_attention"] * 3)
    model = make_model(gma_hf.GMAForCausalLM, config)
    assert not any(isinstance(module, GMAMixture) for module in model.modules())
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    expected = model(generated[:, :-1], use_cache=False).logits[:, 18:].argmax(dim=-1)
    assert torch.equal(generated[:, 19:], expected)


@pytest.mark.quick
def test_plain_trainer_gives_mixtures_no_weight_decay(block, tmp_path):
    """With the stock Trainer, without the user doing anything."""
    model = gma_hf.GMAForCausalLM(tiny_config(block))
    arguments = transformers.TrainingArguments(tmp_path, weight_decay=0.1, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=arguments)
    decayed = trainer.get_decay_parameter_names(model)
    forbidden = ("means", "raw_variances", "prior_logits", "dt_bias", "A_log_bias", "norm")
    assert not [name for name in decayed if any(word in name for word in forbidden)]
    assert any("q_proj" in name for name in decayed)


def test_presets_have_the_size_that_they_say():
    """Equal parameters: a gated block costs little more than the paper's or a softmax block at equal width."""
    sizes = {}
    for name, config in {
        "paper": gma_hf.GMAConfig(**{**TINY, "hidden_size": 256, "intermediate_size": 1024}),
        "gated": gma_hf.GMAConfig.from_preset("gated", **{**TINY, "hidden_size": 256, "intermediate_size": 1024}),
        "hybrid": gma_hf.GMAConfig.from_preset(
            "gated", **{**TINY, "hidden_size": 256, "intermediate_size": 1024, "layer_types": HYBRID_LAYERS}
        ),
    }.items():
        with torch.device("meta"):
            sizes[name] = gma_hf.GMAForCausalLM(config).num_parameters()
    assert sizes["paper"] < sizes["hybrid"] < sizes["gated"] < 1.1 * sizes["paper"]
