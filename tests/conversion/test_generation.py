# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A converted model generates as a native one: from a state of constant size, however the tokens arrive."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMACacheLayer
from tests.conversion.tiny_models import VOCAB, make_converted_model, make_softmax_model
from tests.promises import compiled_decoding_never_recompiles, left_padded_prompts_generate_as_alone


# Float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
LENGTH = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
VARIANTS = {
    "plain": {},
    "all": {"window_size": 4, "num_sink_tokens": 2, "use_forgetting": True, "use_routing_projections": True},
    "hybrid": {"layers": [1], "use_forgetting": True},
    "hybrid-windowed": {"layers": [0], "window_size": 4},
}


@pytest.fixture(params=list(VARIANTS))
def model(request):
    return make_converted_model("llama", **VARIANTS[request.param])


@pytest.fixture
def tokens():
    return torch.randint(3, VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["sampling", "beam", "several"],
)
def test_generating_with_the_cache_equals_generating_without(model, tokens, arguments):
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(tokens, attention_mask=mask, use_cache=use_cache, **arguments, **LENGTH))
    assert torch.equal(*results)


@pytest.mark.quick
def test_left_padded_prompts_generate_as_alone(model, tokens):
    left_padded_prompts_generate_as_alone(model, tokens, **LENGTH)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["dynamic", "bare", "static"])
@pytest.mark.parametrize("splits", [[1] * 19, [5, 1, 13], [7, 12]])
def test_tokens_may_arrive_in_any_portions(model, tokens, splits, kind):
    expected = model(tokens, use_cache=False).logits
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "bare": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }[kind]()
    logits = [model(part, **{CACHE_NAME: cache}).logits for part in tokens.split(splits, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)
    assert int(cache.get_seq_length()) == 19


@pytest.mark.quick
@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_padded_prompt_may_be_read_in_chunks(model, tokens, implementation):
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    arguments = {"attention_mask": mask, "do_sample": False, **LENGTH}
    chunked = model.generate(tokens, prefill_chunk_size=4, cache_implementation=implementation, **arguments)
    assert torch.equal(chunked, model.generate(tokens, **arguments))


@pytest.mark.quick
def test_a_chat_goes_on_from_the_cache_of_its_last_turn(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    first = model.generate(tokens, attention_mask=mask, do_sample=False, return_dict_in_generate=True, **LENGTH)
    turn = torch.cat([first.sequences, tokens[:, :5]], dim=1)
    arguments = {"attention_mask": torch.cat([mask, mask.new_ones(2, 13)], dim=1), "do_sample": False, **LENGTH}
    continued = model.generate(turn, **{CACHE_NAME: first[CACHE_NAME]}, **arguments)
    assert torch.equal(continued, model.generate(turn, **arguments))


@pytest.mark.quick
def test_a_cache_is_copied_repeated_selected_and_reset(model, tokens):
    expected = model(tokens).logits[:, 9:]
    with torch.no_grad():  # PyTorch copies no tensor that a gradient flows through
        cache = model(tokens[:, :9], use_cache=True)[CACHE_NAME]
        fork = copy.deepcopy(cache)
        torch.testing.assert_close(model(tokens[:, 9:], **{CACHE_NAME: fork}).logits, expected, **CLOSE)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        cache.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(model(tokens[:, 9:], **{CACHE_NAME: cache}).logits, expected, **CLOSE)


@pytest.mark.parametrize("options", [VARIANTS["plain"], VARIANTS["all"]], ids=["plain", "all"])
def test_the_size_of_the_state_does_not_depend_on_the_length(options, tokens):
    model = make_converted_model("llama", **options).to(torch.bfloat16)
    sizes = []
    for length in (5, 12, 19):
        cache = model(tokens[:, :length], use_cache=True)[CACHE_NAME]
        assert all(isinstance(layer, GMACacheLayer) for layer in cache.layers)
        states = [state for layer in cache.layers for state in layer.memory if isinstance(state, torch.Tensor)]
        sizes.append(sum(state.numel() * state.element_size() for state in states))
        assert all(state.dtype == torch.float32 for layer in cache.layers for state in layer.state)
    assert len(set(sizes)) == 1


def test_softmax_layers_beside_keep_their_own_cache(tokens):
    model = make_converted_model("llama", layers=[1])
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    assert type(cache.layers[0]) is DynamicLayer and cache.layers[0].keys.shape[2] == 19
    assert isinstance(cache.layers[1], GMACacheLayer)


def test_gradients_flow_from_one_segment_to_the_next(model, tokens):
    model(tokens, use_cache=False).logits[:, 12:].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = model(tokens[:, :12], use_cache=True)[CACHE_NAME]
    model(tokens[:, 12:], **{CACHE_NAME: cache}).logits.square().sum().backward()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert (model.get_parameter(name).grad - gradient).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.quick
def test_gradients_flow_through_single_tokens(model, tokens):
    gradients = []
    for portions in ([19], [1] * 19):
        cache = DynamicCache(config=model.config)
        logits = [model(part, **{CACHE_NAME: cache}).logits for part in tokens.split(portions, dim=1)]
        torch.cat(logits, dim=1).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, expected in gradients[0].items():
        # 19 sums of float32 in another order, where single terms cancel
        assert (gradients[1][name] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


@pytest.mark.quick
def test_a_full_window_is_known_without_a_look_and_changes_nothing(tokens):
    """Padding is forgotten once the window and the sinks have been filled behind it, however the rows are reordered."""
    model = make_converted_model("llama", **VARIANTS["all"])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    num_places = VARIANTS["all"]["window_size"] + VARIANTS["all"]["num_sink_tokens"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, attention_mask=mask, **{CACHE_NAME: cache})
        for step in range(num_places + 3):
            cache.reorder_cache(torch.tensor([1, 0]))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1).flip(0)
            looking = copy.deepcopy(cache)
            for layer in looking.layers:
                layer.num_plain = 0
            histories = [layer.history for layer in (cache.layers[0], looking.layers[0])]
            assert (histories[0].valid is None) == (step >= num_places)
            # What is known once stays known
            assert (histories[1].valid is None) == (step > num_places)
            outputs = [model(tokens[:, :1], attention_mask=mask, **{CACHE_NAME: x}).logits for x in (cache, looking)]
            # Softmax over all places and softmax over the valid ones add the same numbers in another order: 2 units in the
            # last place of logits below 2
            torch.testing.assert_close(*outputs, rtol=0, atol=5e-7)
            for known, seen in zip(cache.layers, looking.layers, strict=True):
                for x, y in zip(known.memory, seen.memory, strict=True):
                    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
                        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("length", [5, 30])
def test_a_cache_does_not_hold_on_to_the_prompt(length):
    model = make_converted_model("llama", **VARIANTS["all"])
    prompt = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (prompt, prompt[:, :1], prompt):
            model(part, **{CACHE_NAME: cache})
            for x in cache.layers[0].memory:
                assert not isinstance(x, torch.Tensor) or x.untyped_storage().nbytes() <= 2 * x.nbytes


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ["all", "hybrid"])
def test_compiled_decoding_never_recompiles(variant, tokens, fresh_compiler):
    model = make_converted_model("llama", **VARIANTS[variant])
    compiled_decoding_never_recompiles(model, tokens, num_steps=6, vocab_size=VOCAB, **CLOSE)


def test_forward_and_backward_compile_in_one_graph(tokens, fresh_compiler):
    model = make_converted_model("llama", overrides={"num_hidden_layers": 1}, **VARIANTS["all"])
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    model.train()
    arguments = {"input_ids": tokens, "labels": tokens, "attention_mask": mask, "use_cache": False}
    expected = model(**arguments)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(**arguments)
    torch.testing.assert_close(outputs.logits[mask == 1], expected.logits[mask == 1], **CLOSE)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.quick
def test_what_a_running_state_cannot_do_is_refused(tokens):
    model = make_converted_model("llama")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens[:1], assistant_model=copy.deepcopy(model), max_new_tokens=4)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(tokens, output_attentions=True, return_dict_in_generate=True, max_new_tokens=4)
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="cannot remove tokens"):
        cache.crop(-1)
    with torch.no_grad():
        filled = make_softmax_model("llama")(tokens, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="already holds a DynamicLayer with content"):
        model(tokens, **{CACHE_NAME: filled})
    with pytest.raises(ValueError, match="bidirectional layer has no state"):
        make_converted_model("bert")(tokens, **{CACHE_NAME: DynamicCache()})
