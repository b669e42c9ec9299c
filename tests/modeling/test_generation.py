# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Generating with the state equals generating without, however the tokens arrive, and the state never grows."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMACacheLayer
from tests.conftest import BLOCKS, TINY, make_model, tiny_config
from tests.promises import left_padded_prompts_generate_as_alone


# Float32 sums in another order, as in the padding tests
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
# Always `max_new_tokens`, so that every comparison covers all of them
LENGTH = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


def cache_bytes(cache: Cache) -> int:
    states = [state for layer in cache.layers for state in layer.memory if isinstance(state, torch.Tensor)]
    return sum(state.numel() * state.element_size() for state in states)


@pytest.fixture
def model(block):
    return make_model(gma_hf.GMAForCausalLM, tiny_config(block))


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampling", "beam", "beam-sampling", "several", "penalty"],
)
def test_generating_with_the_cache_equals_generating_without(model, tokens, arguments):
    mask = torch.ones_like(tokens)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(tokens, attention_mask=mask, use_cache=use_cache, **arguments, **LENGTH))
    assert torch.equal(*results)


@pytest.mark.quick
def test_static_cache_equals_dynamic_cache(model, tokens):
    expected = model.generate(tokens, do_sample=False, **LENGTH)
    for arguments in ({"do_sample": False}, {"do_sample": False, "num_beams": 1, "max_length": None}):
        static = model.generate(tokens, cache_implementation="static", **arguments, **LENGTH)
        assert torch.equal(static, expected)
    beams = [
        model.generate(tokens, do_sample=False, num_beams=3, cache_implementation=implementation, **LENGTH)
        for implementation in (None, "static")
    ]
    assert torch.equal(*beams)


@pytest.mark.quick
def test_left_padded_prompts_generate_as_alone(model, tokens):
    left_padded_prompts_generate_as_alone(model, tokens, **LENGTH)


@pytest.mark.quick
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("splits", [[1] * 19, [5, 1, 13], [18, 1], [7, 12]])
def test_tokens_may_arrive_in_any_portions(model, tokens, splits, static):
    expected = model(tokens, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    logits = [model(part, **{CACHE_NAME: cache}).logits for part in tokens.split(splits, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)
    assert int(cache.get_seq_length()) == 19


@pytest.mark.quick
def test_a_cache_made_without_configuration_works_too(model, tokens):
    expected = model(tokens, use_cache=False).logits
    cache = DynamicCache()
    first = model(tokens[:, :9], **{CACHE_NAME: cache}).logits
    second = model(tokens[:, 9:], **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, **TOLERANCE)


@pytest.mark.quick
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "hybrid"])
def test_a_reset_cache_is_a_new_cache(model, tokens, static):
    """Of GMA layers. Those of softmax layers are Transformers' own; in 5.17 a reset leaves zeroed keys behind."""
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    expected = model(tokens, **{CACHE_NAME: cache}).logits
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    torch.testing.assert_close(model(tokens, **{CACHE_NAME: cache}).logits, expected, rtol=0, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_is_copied_and_pickled(model, tokens, static, tmp_path):
    expected = model(tokens, use_cache=False).logits[:, 9:]
    with torch.no_grad():  # PyTorch copies no tensor that a gradient flows through
        cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
        model(tokens[:, :9], **{CACHE_NAME: cache})
        torch.save(cache, tmp_path / "cache.pt")
        for copied in (copy.deepcopy(cache), torch.load(tmp_path / "cache.pt", weights_only=False), cache):
            torch.testing.assert_close(model(tokens[:, 9:], **{CACHE_NAME: copied}).logits, expected, **TOLERANCE)


@pytest.mark.quick
@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_prompt_may_be_read_in_chunks(model, tokens, implementation):
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    arguments = {"attention_mask": mask, "do_sample": False, **LENGTH}
    chunked = model.generate(tokens, prefill_chunk_size=4, cache_implementation=implementation, **arguments)
    assert torch.equal(chunked, model.generate(tokens, **arguments))


@pytest.mark.quick
@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_may_end_at_different_times(model, tokens, num_beams):
    """A row that met its end token is padded on while the others go on."""
    greedy = model.generate(tokens, do_sample=False, **LENGTH)
    arguments = {**LENGTH, "eos_token_id": int(greedy[0, 21]), "do_sample": False, "num_beams": num_beams}
    expected = model.generate(tokens, use_cache=False, **arguments)
    assert torch.equal(model.generate(tokens, **arguments), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **arguments), expected)


@pytest.mark.quick
@pytest.mark.parametrize("padding", [0, 6])
def test_a_chat_goes_on_from_the_cache_of_its_last_turn(model, tokens, padding):
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    first = model.generate(tokens, attention_mask=mask, do_sample=False, return_dict_in_generate=True, **LENGTH)
    turn = torch.cat([first.sequences, tokens[:, :5]], dim=1)
    arguments = {"attention_mask": torch.cat([mask, mask.new_ones(2, 17)], dim=1), "do_sample": False, **LENGTH}
    continued = model.generate(turn, **{CACHE_NAME: first[CACHE_NAME]}, **arguments)
    assert torch.equal(continued, model.generate(turn, **arguments))


@pytest.mark.quick
def test_a_mask_of_the_current_tokens_alone(tokens):
    """A GMA state needs no mask of what went into it; softmax layers read the cached tokens again and do."""
    mask = torch.ones(2, 9, dtype=torch.long)
    for block in ("paper", "gated"):
        model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
        cache = model(tokens[:, :10], use_cache=True)[CACHE_NAME]
        logits = model(tokens[:, 10:], **{CACHE_NAME: cache}, attention_mask=mask).logits
        torch.testing.assert_close(logits, model(tokens).logits[:, 10:], **TOLERANCE)
    hybrid = make_model(gma_hf.GMAForCausalLM, tiny_config("hybrid"))
    cache = hybrid(tokens[:, :10], use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="it must cover them as well, 19 tokens in all"):
        hybrid(tokens[:, 10:], **{CACHE_NAME: cache}, attention_mask=mask)


@pytest.mark.quick
def test_a_prompt_is_saved_loaded_and_forked(model, tokens, tmp_path):
    prompt = tokens[:1]
    cache = model(prompt[:, :-1], use_cache=True)[CACHE_NAME]
    gma_hf.save_cache(cache, tmp_path / "prompt.safetensors")
    expected = model.generate(prompt, do_sample=False, **LENGTH)

    loaded = gma_hf.load_cache(tmp_path / "prompt.safetensors", model.config)
    assert loaded.get_seq_length() == 18
    for fork in (copy.deepcopy(loaded), copy.deepcopy(loaded)):
        assert torch.equal(model.generate(prompt, **{CACHE_NAME: fork}, do_sample=False, **LENGTH), expected)

    loaded.batch_repeat_interleave(3)
    many = prompt.expand(3, -1)
    torch.manual_seed(0)
    continued = model.generate(many, **{CACHE_NAME: loaded}, do_sample=True, **LENGTH)
    torch.manual_seed(0)
    assert torch.equal(continued, model.generate(many, do_sample=True, **LENGTH))


@pytest.mark.quick
def test_a_cache_that_does_not_fit_is_refused(tokens, tmp_path):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    path = tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="cache is empty"):
        gma_hf.save_cache(gma_hf.modeling.adopt_cache(DynamicCache(config=model.config), model.config), path)
    gma_hf.save_cache(model(tokens, use_cache=True)[CACHE_NAME], path)
    with pytest.raises(ValueError, match="does not fit the model"):
        gma_hf.load_cache(path, tiny_config("gated", num_components=5))
    with pytest.raises(ValueError, match="does not fit the model"):
        gma_hf.load_cache(path, tiny_config("hybrid"))
    static = StaticCache(config=model.config, max_cache_len=32)
    model(tokens, **{CACHE_NAME: static})
    with pytest.raises(ValueError, match="Only a `DynamicCache` can be saved"):
        gma_hf.save_cache(static, path)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no cache"):
        gma_hf.load_cache(tmp_path / "model.safetensors", model.config)


@pytest.mark.quick
def test_batch_operations_on_the_cache(model, tokens):
    cache = model(tokens[:, :9], use_cache=True)[CACHE_NAME]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(tokens[:, 9:], **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, 9:], **TOLERANCE)


@pytest.mark.quick
def test_the_state_is_float32_and_its_size_does_not_depend_on_the_length(tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated")).to(torch.bfloat16)
    sizes = []
    for length in (1, 4, 19):
        cache = model(tokens[:, :length], use_cache=True)[CACHE_NAME]
        sizes.append(cache_bytes(cache))
        for layer in cache.layers:
            assert isinstance(layer, GMACacheLayer)
            assert all(state.dtype == torch.float32 for state in layer.state)
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_hundred_thousand_tokens_stream_through_with_flat_memory():
    config = tiny_config("gated", num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    model = make_model(gma_hf.GMAForCausalLM, config)
    generator = torch.Generator().manual_seed(0)
    cache, sizes = DynamicCache(config=config), []
    with torch.no_grad():
        for _ in range(50):
            segment = torch.randint(3, TINY["vocab_size"], (1, 2000), generator=generator)
            outputs = model(segment, **{CACHE_NAME: cache}, logits_to_keep=1)
            sizes.append(cache_bytes(cache))
    assert cache.get_seq_length() == 100_000
    assert len(set(sizes)) == 1
    assert outputs.logits.isfinite().all()


@pytest.mark.quick
def test_gradients_flow_from_one_segment_to_the_next(model, tokens):
    """Training on long texts segment by segment, with the state carried over."""
    model(tokens, labels=tokens, use_cache=False).logits[:, 12:].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    cache = model(tokens[:, :12], use_cache=True)[CACHE_NAME]
    model(tokens[:, 12:], **{CACHE_NAME: cache}).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.quick
def test_what_a_running_state_cannot_do_is_refused(tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens[:1], assistant_model=copy.deepcopy(model), max_new_tokens=4)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens[:1], prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(tokens, output_attentions=True, return_dict_in_generate=True, max_new_tokens=4)
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot remove tokens"):
        cache.crop(-1)
    encoder = make_model(gma_hf.GMAModel, tiny_config("gated", is_causal=False))
    with pytest.raises(ValueError, match="bidirectional model has no state"):
        encoder(tokens, **{CACHE_NAME: DynamicCache()})


@pytest.mark.quick
def test_generation_from_embeddings(model, tokens):
    embeds = model.get_input_embeddings()(tokens)
    from_embeds = model.generate(inputs_embeds=embeds, do_sample=False, **LENGTH)
    assert torch.equal(from_embeds, model.generate(tokens, do_sample=False, **LENGTH)[:, 19:])


@pytest.mark.quick
def test_logits_to_keep(model, tokens):
    expected = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, expected[:, -1:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([2, 5])).logits, expected[:, [2, 5]])
