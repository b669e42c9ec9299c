# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Sink tokens: a sequence's first tokens stay visible to the window's softmax and stay out of the memory. What holds for any
window, such as that padding and portions change nothing, is tested with and without them in test_window and with the models.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMAWindow
from tests.conftest import TINY, make_model, tiny_config
from tests.windows import BATCH, EXACT, HEAD_DIM, attend, implied, part, problem


# Float32 sums in another order, through three layers
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.quick
@pytest.mark.parametrize("num_sinks", [1, 3])
def test_beyond_the_window_the_first_token_is_seen_exactly(num_sinks):
    """Its value changes the output by its share of the softmax, whatever the memory holds, and by nothing else."""
    p = problem(window=4, length=30, num_sinks=num_sinks)
    step = torch.randn(p.tokens["value"].shape[-1], dtype=torch.float64)
    moved = p.tokens["value"].clone()
    moved[:, :, 0] += step
    with torch.no_grad():
        change = attend(p, {**p.tokens, "value": moved}) - attend(p)
        tokens = {name: x for name, x in p.tokens.items() if name != "value"}
        affinity = implied(p, **tokens)
    share = affinity[..., 0]
    torch.testing.assert_close(change, share[..., None] * step, **EXACT)
    # Beside what the query itself gets, which is in the window: as in softmax over them
    key = p.tokens["key"].repeat_interleave(2, dim=1)
    logits = [HEAD_DIM**-0.5 * (p.tokens["query"] * x).sum(-1) for x in (key[:, :, :1], key)]
    ratio = share / affinity.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(ratio, (logits[0] - logits[1]).exp(), **EXACT)


@pytest.mark.quick
def test_sink_tokens_never_write():
    """The state does not know them: neither their values, nor their weights, nor their forgetting."""
    p = problem(window=3, length=20, num_sinks=4)
    other = {name: torch.cat([torch.randn_like(x[:, :, :4]), x[:, :, 4:]], dim=2) for name, x in p.tokens.items()}
    mask = torch.ones(BATCH, 20, dtype=torch.bool)
    for arguments in ({}, {"padding_mask": mask}, {"sequence_ids": torch.zeros(BATCH, 20)}):
        histories = [attend(p, tokens, output_history=True, **arguments)[1] for tokens in (p.tokens, other)]
        for name in ("state", "normalizer"):
            torch.testing.assert_close(*(getattr(history, name) for history in histories), rtol=0, atol=0)
        assert histories[0].sink_valid.all()
        torch.testing.assert_close(histories[1].sink_values, other["value"][:, :, :4], rtol=0, atol=0)


@pytest.mark.quick
def test_window_and_sinks_over_everything_are_softmax_attention():
    p = problem(window=20, length=23, num_sinks=3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        p.tokens["query"], p.tokens["key"], p.tokens["value"], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attend(p), expected, **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize("bias", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_a_constant_in_all_logits_changes_nothing(shift, bias):
    """Softmax does not see it, wherever the logits of pretrained models lie; nor do queries without a memory see its bias."""
    p = problem(window=4, length=9, num_sinks=5, decay=False)
    with torch.no_grad():
        # What all keys have in common adds the same to all logits of a query; the memory's logit is not one of them
        query = p.tokens["query"].clone()
        query[..., 0] = 1.0
        key = p.tokens["key"].clone()
        key[..., 0] = 0.0
        p.tokens.update(query=query, key=key)
        expected = attend(p)
        p.window.memory_bias.fill_(bias)
        key = key.clone()
        key[..., 0] = shift * HEAD_DIM**0.5
        torch.testing.assert_close(attend(p, {**p.tokens, "key": key}), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.quick
def test_gradients_reach_the_sinks_of_earlier_portions():
    p = problem(window=3, length=11, num_sinks=2)
    inputs = [x.requires_grad_() for x in p.tokens.values()]

    def function(*tensors):
        tokens = dict(zip(p.tokens, tensors, strict=True))
        first, history = attend(p, part(tokens, 0, 4), output_history=True)
        second, history = attend(p, part(tokens, 4, 7), history=history, output_history=True)
        return first, second, attend(p, part(tokens, 7, 11), history=history)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    torch.testing.assert_close(torch.cat(function(*inputs), dim=2), attend(p), **EXACT)


@pytest.mark.quick
def test_after_a_packed_row_the_history_belongs_to_the_last_sequence():
    p = problem(window=3, length=24, num_sinks=2)
    for bound in (10, 15, 17, 19):  # of 20 tokens that are read first
        ids = (torch.arange(20) >= bound).long().expand(BATCH, -1)
        _, history = attend(p, part(p.tokens, 0, 20), sequence_ids=ids, output_history=True)
        assert history.sink_valid.sum(dim=1).tolist() == [min(2, max(0, 20 - bound - 3))] * BATCH
        assert history.count.tolist() == [max(0, 20 - bound - 3 - 2)] * BATCH
        output = attend(p, part(p.tokens, 20, 24), history=history)
        alone = attend(p, part(p.tokens, bound, 24))[:, :, -4:]
        torch.testing.assert_close(output, alone, **EXACT)


@pytest.mark.quick
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        GMAWindow(4, HEAD_DIM, 3, num_sink_tokens=-1)
    _, history = attend(problem(window=4, length=6, num_sinks=1), output_history=True)
    for window, num_sinks in ((4, 2), (4, 0), (5, 0)):
        with pytest.raises(ValueError, match="Was it written by another model"):
            attend(problem(window, length=6, num_sinks=num_sinks), history=history)


@pytest.mark.quick
def test_a_bidirectional_call_knows_no_first_tokens():
    outputs = [attend(problem(window=3, length=12, decay=False, num_sinks=n), causal=False) for n in (0, 2)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.fixture
def model():
    config = tiny_config("paper-rope", window_size=4, num_sink_tokens=3)
    return make_model(gma_hf.GMAForCausalLM, config)


@pytest.mark.quick
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("splits", [[1] * 19, [2, 1, 3, 13], [18, 1]])
def test_models_read_tokens_in_any_portions(model, tokens, splits, static):
    expected = model(tokens, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    for _ in range(2):
        logits = [model(portion, **{CACHE_NAME: cache}).logits for portion in tokens.split(splits, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)
        # And once more from the beginning: nothing of the old sinks is left
        cache.reset()


@pytest.mark.quick
def test_prompts_survive_disk_and_fit_only_their_model(model, tokens, tmp_path):
    path = tmp_path / "prompt.safetensors"
    gma_hf.save_cache(model(tokens[:, :12], use_cache=True)[CACHE_NAME], path)
    logits = model(tokens[:, 12:], **{CACHE_NAME: gma_hf.load_cache(path, model.config)}).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, 12:], **TOLERANCE)
    for changes in ({"num_sink_tokens": 0}, {"num_sink_tokens": 2, "window_size": 5}):
        other = gma_hf.GMAConfig.from_dict({**model.config.to_dict(), **changes})
        with pytest.raises(ValueError, match="4 tokens and 3 sink tokens, the model needs"):
            gma_hf.load_cache(path, other)


@pytest.mark.quick
def test_the_memory_held_does_not_grow(model, tokens):
    sizes = set()
    for length in (1, 5, 19):
        history = model(tokens[:, :length], use_cache=True)[CACHE_NAME].layers[0].memory
        sizes.add(sum(x.untyped_storage().nbytes() for x in history if isinstance(x, torch.Tensor)))
        assert history.sink_valid.sum(dim=1).tolist() == [min(3, max(0, length - 4))] * 2
    assert len(sizes) == 1


@pytest.mark.quick
def test_beams_and_left_padding_change_nothing(model, tokens):
    tokens[0, :8] = 0
    for num_beams in (1, 3):
        arguments = {"max_new_tokens": 9, "eos_token_id": None, "do_sample": False, "num_beams": num_beams}
        arguments["attention_mask"] = (tokens != 0).long()
        expected = model.generate(tokens, use_cache=False, **arguments)
        for implementation in (None, "static"):
            assert torch.equal(model.generate(tokens, cache_implementation=implementation, **arguments), expected)
    alone = model.generate(tokens[:1, 8:], max_new_tokens=9, eos_token_id=None, do_sample=False)
    together = model.generate(
        tokens, max_new_tokens=9, eos_token_id=None, do_sample=False, attention_mask=(tokens != 0).long()
    )
    assert torch.equal(together[0, 19:], alone[0, 11:])


def test_a_model_without_sink_tokens_exports_with_any_length(tokens):
    """As with some, which the other models with a window have."""
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("windowed", num_sink_tokens=0, num_hidden_layers=1))
    exported = torch.export.export(
        model,
        (),
        {"input_ids": tokens, "use_cache": False},
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=128)}, "use_cache": None},
        strict=False,
    )
    longer = torch.randint(3, TINY["vocab_size"], (2, 57), generator=torch.Generator().manual_seed(4))
    expected = model(longer, use_cache=False).logits
    torch.testing.assert_close(exported.module()(input_ids=longer, use_cache=False).logits, expected, **TOLERANCE)
