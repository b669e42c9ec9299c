# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Every promised architecture converts and keeps its habits: direction, padding, packing, caches, saving, reverting."""

import pytest
import torch
import transformers

import gma_hf
from gma_hf import convert_to_gma, gma_layers, revert_to_softmax
from tests.conversion.tiny_models import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    SEQUENCE_TO_SEQUENCE,
    VOCAB,
    make_converted_model,
    make_inputs,
    make_softmax_model,
    output_of,
    perturb,
)


# Everything a converted layer can have; what a layer does not take (an encoder does not forget) it leaves out
PLAIN = {"use_routing_projections": True}
WINDOWED = {"window_size": 3}
# Differences from adding the same float32 numbers in another order, over two layers of logits of order one to ten
CLOSE = {"rtol": 1e-4, "atol": 5e-5}

quick = pytest.mark.quick
SOME = ("llama", "gemma2", "bert", "vit", "whisper")


def marked(model_types):
    return [pytest.param(name, marks=quick) if name in SOME else name for name in model_types]


def options_for(model_type: str, **options):
    return {**options, **({"use_forgetting": True} if model_type in DECODERS else {})}


def auto_class(model_class):
    """The Auto class that loads a model class."""
    heads = {
        "CausalLM": "CausalLM",
        "LMHeadModel": "CausalLM",
        "MaskedLM": "MaskedLM",
        "ImageClassification": "ImageClassification",
        "BartForConditionalGeneration": "Seq2SeqLM",
        "WhisperForConditionalGeneration": "SpeechSeq2Seq",
    }
    head = next((head for ending, head in heads.items() if model_class.__name__.endswith(ending)), None)
    if model_class.__name__ == "SiglipTextModel":  # which no Auto class knows
        return gma_hf.conversion.checkpoints.classes.GMASiglipTextModel
    return getattr(transformers, "AutoModel" if head is None else f"AutoModelFor{head}")


@pytest.mark.parametrize("model_type", marked(FAMILIES))
def test_conversion_saves_loads_and_reverts(model_type, tmp_path):
    model, inputs = make_softmax_model(model_type), make_inputs(model_type)
    original_class, original_output = type(model), output_of(model, **inputs)
    original_names = set(model.state_dict())

    assert convert_to_gma(model, num_components=6, **options_for(model_type, **PLAIN)) is model
    perturb(model)
    converted_output = output_of(model, **inputs)
    assert type(model).__name__ == f"GMA{original_class.__name__}"
    assert model.config.model_type == f"gma_{model_type}"
    assert (converted_output - original_output).abs().max() > 1e-3  # something else is computed now
    assert original_names <= set(model.state_dict())  # and no weight has another name

    model.save_pretrained(tmp_path)
    loaded = auto_class(original_class).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(output_of(loaded, **inputs), converted_output)

    revert_to_softmax(model)
    assert type(model) is original_class
    assert set(model.state_dict()) == original_names
    assert torch.equal(output_of(model, **inputs), original_output)


@pytest.mark.parametrize("model_type", marked(FAMILIES))
@pytest.mark.parametrize("options", [PLAIN, WINDOWED], ids=["plain", "windowed"])
def test_direction_is_that_of_the_model(model_type, options):
    """A change of the last token reaches no earlier token of a causal model, and every token of a bidirectional one."""
    model, inputs = make_converted_model(model_type, **options_for(model_type, **options)), make_inputs(model_type)
    name = next(n for n in ("decoder_input_ids", "pixel_values", "input_ids") if n in inputs)
    changed = inputs[name].clone()
    if name == "pixel_values":
        changed[..., -2:, -2:] += 1.0  # the last patch
    else:
        changed[:, -1] = 3 + (changed[:, -1] - 2) % (VOCAB - 3)
    assert not torch.equal(changed, inputs[name])
    outputs = [output_of(model, **{**inputs, name: value}) for value in (inputs[name], changed)]
    if list(gma_layers(model).values())[-1].is_causal:
        assert torch.equal(*(output[:, :-1] for output in outputs))
        assert not torch.equal(*(output[:, -1] for output in outputs))
    elif outputs[0].ndim == 3:
        assert (outputs[0][:, 0] != outputs[1][:, 0]).any()
    else:
        assert not torch.equal(*outputs)


PADDED = [*DECODERS, *ENCODERS]


@pytest.mark.parametrize("model_type", marked(PADDED))
@pytest.mark.parametrize("options", [PLAIN, WINDOWED], ids=["plain", "windowed"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_writes(model_type, options, side):
    """A padded row gives what the row gives alone."""
    model = make_converted_model(model_type, **options_for(model_type, **options))
    tokens = make_inputs(model_type, batch_size=1, length=9)["input_ids"]
    longer = make_inputs(model_type, batch_size=2, length=14)["input_ids"][1:]
    filler = torch.full((1, 5), 0)
    parts = (tokens, filler) if side == "right" else (filler, tokens)
    batch = torch.cat([torch.cat(parts, dim=1), longer])
    mask = torch.cat([torch.cat([torch.full_like(part, part is tokens) for part in parts], dim=1), torch.ones(1, 14)])
    mask = mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask}
    if side == "left" and model_type in ("gpt2", "bert", "distilbert", "electra", "siglip_text_model"):
        # Learned absolute positions, which count padding unless they are given
        arguments["position_ids"] = positions
    output = output_of(model, input_ids=batch, **arguments)
    rows = slice(0, 9) if side == "right" else slice(5, 14)
    torch.testing.assert_close(output[:1, rows], output_of(model, input_ids=tokens), **CLOSE)
    torch.testing.assert_close(output[1:], output_of(model, input_ids=longer), **CLOSE)


# The others do not tell packed sequences apart by their positions in Transformers either
PACKED = [model_type for model_type in DECODERS if model_type not in ("opt", "gpt_oss")]


@pytest.mark.parametrize("model_type", marked(PACKED))
@pytest.mark.parametrize("options", [PLAIN, WINDOWED], ids=["plain", "windowed"])
def test_packed_sequences_never_meet(model_type, options):
    """Sequences packed into one row, told apart by their positions, give what each gives alone."""
    model = make_converted_model(model_type, **options_for(model_type, **options))
    sequences = [make_inputs(model_type, batch_size=1, length=length)["input_ids"] for length in (5, 9, 3)]
    positions = torch.cat([torch.arange(sequence.shape[1]) for sequence in sequences])[None]
    packed = output_of(model, input_ids=torch.cat(sequences, dim=1), position_ids=positions, use_cache=False)
    alone = torch.cat([output_of(model, input_ids=sequence) for sequence in sequences], dim=1)
    torch.testing.assert_close(packed, alone, **CLOSE)


GENERATORS = [*DECODERS, *SEQUENCE_TO_SEQUENCE]


def generation_inputs(model_type, **shape):
    inputs = make_inputs(model_type, **shape)
    if model_type in SEQUENCE_TO_SEQUENCE:
        inputs.pop("decoder_input_ids")
    return inputs


@pytest.mark.parametrize("model_type", marked(GENERATORS))
@pytest.mark.parametrize("options", [PLAIN, WINDOWED], ids=["plain", "windowed"])
def test_generation_with_a_cache_is_generation_without(model_type, options):
    model = make_converted_model(model_type, **options_for(model_type, **options))
    inputs = generation_inputs(model_type, length=7)
    arguments = {
        "max_new_tokens": 9,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(**inputs, **arguments, use_cache=True)
    uncached = model.generate(**inputs, **arguments, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)
    static = model.generate(**inputs, **arguments, cache_implementation="static", disable_compile=True)
    assert torch.equal(cached.sequences, static.sequences)


@pytest.mark.parametrize("model_type", marked(DECODERS))
def test_kept_layers_stay_what_they_were(model_type):
    """Up to the first converted layer nothing changes, and a model with both kinds pads, caches and generates as well."""
    softmax = make_softmax_model(model_type)
    model = make_converted_model(model_type, layers=[1], **options_for(model_type, **PLAIN))
    tokens = make_inputs(model_type)["input_ids"]
    with torch.no_grad():
        before, after = (one(tokens, output_hidden_states=True).hidden_states for one in (softmax, model))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])

    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    arguments = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    cached = model.generate(tokens, **arguments)
    assert torch.equal(cached, model.generate(tokens, **arguments, use_cache=False))
    alone = model.generate(tokens[:1, 4:], **{**arguments, "attention_mask": mask[:1, 4:]})
    assert torch.equal(cached[:1, 4:], alone)
    static = model.generate(tokens, **arguments, cache_implementation="static", disable_compile=True)
    assert torch.equal(cached, static)
