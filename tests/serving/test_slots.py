# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Streams that come and go, in steps that mix beginnings, chunks and single tokens: each of them gives what its sequence alone gives,
whatever its slot held before. The scheduler here stands for vLLM's, so that these tests need no vLLM.
"""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMACacheLayer
from gma_hf.modeling.attention_gma import GMAAttention
from gma_hf.modeling.cache_gma import counted
from gma_hf.ops.attention import slots as slots_of_operator
from gma_hf.ops.attention.packed import FREE_PADDING, PADDED_SHARE
from gma_hf.ops.rotation.functional import Rotation
from gma_hf.serving.layouts import model_layout, stream_bytes
from gma_hf.serving.slots import ALIGNMENT, SlotCache, run_step
from gma_hf.serving.steps import group_step
from tests.serving.models import CONVERTED, NATIVE, make_model


NUM_SLOTS = 7
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 130, 40, 5, 1]


def poison(tensors: list[torch.Tensor]) -> None:
    """What a slot holds that nobody wrote: nothing that is read of it goes unnoticed."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


def run_streams(sequences: list[tuple[torch.Tensor, ...]], layout, attend, width: int, rng: random.Random):
    """
    Runs sequences, each a tuple of `(length, ...)`, through one layer by steps of random chunks, in random slots that are
    poisoned whenever a sequence has left them. Returns the outputs of each, `(length, width)`.
    """
    tensors = [torch.empty(NUM_SLOTS, *field.shape, dtype=field.dtype) for field in layout.fields()]
    poison(tensors)
    free, waiting, running = list(range(NUM_SLOTS)), list(range(len(sequences))), {}
    outputs = [torch.empty(0, width) for _ in sequences]
    while waiting or running:
        while waiting and free and rng.random() < 0.7:
            running[waiting.pop(0)] = free.pop(rng.randrange(len(free)))
        chosen = [index for index in running if rng.random() < 0.8]
        contexts = [len(outputs[index]) for index in chosen]
        lengths = [
            min(rng.choice([1, 1, 2, 5, 16, 40]), len(sequences[index][0]) - context)
            for index, context in zip(chosen, contexts, strict=True)
        ]
        if not chosen:
            continue
        slots = torch.tensor([running[index] for index in chosen])
        groups = group_step(lengths, contexts, slots, packed=layout.window_size == 0)
        steps = list(zip(chosen, contexts, lengths, strict=True))
        inputs = [
            torch.cat([sequences[index][part][context : context + length] for index, context, length in steps])
            for part in range(len(sequences[0]))
        ]
        output = run_step(groups, layout, tensors, inputs, torch.zeros(sum(lengths), width), attend)
        for index, part in zip(chosen, output.split(lengths), strict=True):
            outputs[index] = torch.cat([outputs[index], part])
            if len(outputs[index]) == len(sequences[index][0]):
                slot = running.pop(index)
                poison([tensor[slot] for tensor in tensors])
                free.append(slot)
    return outputs


def expect_equal(outputs: list[torch.Tensor], expected: list[torch.Tensor], correlate: bool = False) -> None:
    """
    Sums of some hundred products of numbers around one, in float32, in another order. Correlated routes are scaled to unit length
    after most of them has cancelled: one sequence alone is 2e-4 away from the same in float64.
    """
    tolerance = {"atol": 2e-4, "rtol": 2e-3} if correlate else {"atol": 2e-5, "rtol": 2e-4}
    for output, alone in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, alone, **tolerance)


@torch.no_grad()
@pytest.mark.parametrize("kind", list(NATIVE))
def test_streams_of_a_native_layer_equal_their_sequences_alone(kind):
    model = make_model(kind)
    config, layer = model.config, model.model.layers[0].self_attn
    rotary_embs = model.model.rotary_embs
    generator = torch.Generator().manual_seed(1)
    sequences, expected = [], []
    for length in LENGTHS:
        hidden_states = torch.randn(length, config.hidden_size, generator=generator)
        inputs = (hidden_states,)
        if "linear_attention" in rotary_embs:
            inputs += tuple(x[0] for x in rotary_embs["linear_attention"](hidden_states, torch.arange(length)[None]))
        sequences.append(inputs)
        rotation = tuple(x[None] for x in inputs[1:]) or None
        expected.append(layer(hidden_states[None], position_embeddings=rotation)[0][0])

    def attend(inputs, group, memory):
        hidden_states, *rotation = inputs
        return GMAAttention.forward(
            layer,
            hidden_states,
            layout=group.layout,
            position_embeddings=tuple(rotation) or None,
            **{CACHE_NAME: SlotCache(0, memory)},
        )[0]

    layout = model_layout(config, torch.float32)
    outputs = run_streams(sequences, layout, attend, config.hidden_size, random.Random(2))
    expect_equal(outputs, expected, config.correlate)


@torch.no_grad()
@pytest.mark.parametrize("kind", list(CONVERTED))
def test_streams_of_a_converted_layer_equal_their_sequences_alone(kind):
    model = make_model(kind)
    conversion = model.model.layers[0].self_attn.gma
    generator = torch.Generator().manual_seed(1)
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(max(LENGTHS))[None])

    def rotation_at(positions):
        if conversion.rotary_dim == 0:
            return None
        return Rotation(apply_rotary_pos_emb, cos[0][positions], sin[0][positions])

    sequences, expected = [], []
    for length in LENGTHS:
        heads = (conversion.num_heads, conversion.num_key_value_heads, conversion.num_key_value_heads)
        inputs = tuple(torch.randn(length, n, conversion.routing_dim, generator=generator) for n in heads)
        sequences.append(inputs)
        query, key, value = (x.transpose(0, 1)[None] for x in inputs)
        output, _ = conversion(query, key, value, rotation=rotation_at(torch.arange(length)[None]))
        expected.append(output[0].transpose(0, 1).flatten(1))

    def attend(inputs, group, memory):
        query, key, value = (x.transpose(1, 2) for x in inputs)
        rotation = rotation_at(group.positions)
        output, _ = conversion(query, key, value, group.layout, rotation=rotation, cache_layer=memory)
        return output.transpose(1, 2).flatten(2)

    layout = model_layout(model.config, torch.float32)
    width = conversion.num_heads * conversion.value_dim
    expect_equal(run_streams(sequences, layout, attend, width, random.Random(2)), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated", "llama", "window and sinks"])
def test_the_attention_of_a_step_is_one_packed_prefill_and_one_step_in_slots(kind, monkeypatch):
    """Both by the operator, which advances the states in their slots; layers with a window decode in slots, too."""
    calls = []

    in_slots = slots_of_operator.attend_in_slots

    def attend_in_slots(call, sequences, states, slots, backend):
        calls.append((None if sequences is None else sequences.lengths[0], states[0].shape[0]))
        return in_slots(call, sequences, states, slots, backend)

    monkeypatch.setattr(slots_of_operator, "attend_in_slots", attend_in_slots)
    model = make_model(kind)
    layout = model_layout(model.config, torch.float32)
    tensors = [torch.zeros(NUM_SLOTS, *field.shape, dtype=field.dtype) for field in layout.fields()]
    layer = model.model.layers[0].self_attn
    width, packed = model.config.hidden_size, layout.window_size == 0
    lengths, contexts, slots = [1, 5, 1, 40, 1], [7, 3, 9, 0, 0], torch.tensor([3, 0, 6, 1, 5])

    def attend(inputs, group, memory):
        if kind == "llama":
            query = inputs[0].unflatten(-1, (4, 16)).transpose(1, 2)
            key = value = query[:, :2]
            cos, sin = model.model.rotary_emb(inputs[0], group.positions)
            rotation = Rotation(apply_rotary_pos_emb, cos, sin)
            output, _ = layer.gma(query, key, value, group.layout, rotation=rotation, cache_layer=memory)
            return output.transpose(1, 2).flatten(2)
        rotation = None
        if "linear_attention" in model.model.rotary_embs:
            rotation = model.model.rotary_embs["linear_attention"](inputs[0], group.positions)
        cache = {CACHE_NAME: SlotCache(0, memory)}
        return GMAAttention.forward(layer, inputs[0], layout=group.layout, position_embeddings=rotation, **cache)[0]

    groups = group_step(lengths, contexts, slots, packed=packed)
    run_step(groups, layout, tensors, [torch.randn(sum(lengths), width)], torch.zeros(sum(lengths), width), attend)
    if packed:
        assert calls == [(None, NUM_SLOTS), ([5, 40, 1], NUM_SLOTS)]
    else:  # two rows by one token, one row by five; the other two begin, so nothing is read from their slots
        assert calls == [(None, NUM_SLOTS)] * 2


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 3)), min_size=1, max_size=20), st.booleans())
def test_every_token_of_a_step_is_in_one_group_and_padding_is_bounded(sequences, packed):
    lengths, contexts = zip(*sequences, strict=True)
    slots = torch.arange(len(lengths)) + 100
    seen, members = [], []
    groups = group_step(lengths, contexts, slots, packed=packed)
    for group in groups:
        mask = group.layout.padding_mask
        mask = torch.ones_like(group.tokens, dtype=torch.bool) if mask is None else mask
        seen += group.tokens[mask].tolist()
        members += group.slots.tolist()
        if group.layout.sequences is None:
            tokens, positions = ([x[row][mask[row]] for row in range(len(x))] for x in (group.tokens, group.positions))
            longest = group.tokens.shape[1]
            assert int((~mask).sum(dim=1).max()) <= max(FREE_PADDING, PADDED_SHARE * longest)
        else:
            counts = group.layout.sequences.lengths[0]
            tokens, positions = (x[0].split(counts) for x in (group.tokens, group.positions))
        fresh = [] if group.fresh_slots is None else group.fresh_slots.tolist()
        for slot, places, numbers in zip(group.slots.tolist(), tokens, positions, strict=True):
            length, context = lengths[slot - 100], contexts[slot - 100]
            assert group.is_fresh or (slot in fresh) == (context == 0)
            assert not group.is_fresh or context == 0
            assert numbers.tolist() == list(range(context, context + length))
            start = sum(lengths[: slot - 100])
            assert places.tolist() == list(range(start, start + length))
    assert sorted(seen) == list(range(sum(lengths)))
    assert sorted(members) == [slot for slot, length in zip(slots.tolist(), lengths, strict=True) if length > 0]
    assert not packed or len(groups) <= 2


@pytest.mark.parametrize("kind", [*NATIVE, *CONVERTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_a_slot_lie_at_multiples_of_their_size(kind, dtype):
    """vLLM cuts the tensors out of one page of bytes, one behind the other."""
    layout = model_layout(make_model(kind).config, dtype)
    place = 0
    for field in layout.fields():
        assert place % field.dtype.itemsize == 0, field.name
        place += field.num_bytes
    assert place == layout.num_bytes
    assert place % ALIGNMENT == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated window", "hybrid", "llama with everything", "qwen3 hybrid"])
def test_the_bytes_of_a_stream_are_those_of_a_cache(kind):
    """`stream_bytes` says from the configuration what `generate` keeps; only the alignment of slots comes on top."""
    model = make_model(kind)
    length = 50
    cache = model(torch.ones(1, length, dtype=torch.long), use_cache=True)[CACHE_NAME]
    kept = 0
    for layer in cache.layers:
        tensors = counted(layer.memory) if isinstance(layer, GMACacheLayer) else [layer.keys, layer.values]
        kept += sum(x.nbytes for x in tensors if x is not None)
    expected = stream_bytes(model.config, torch.float32, length)
    # A count of tokens takes four bytes of a slot, and eight of a cache
    assert abs(expected - kept) <= ALIGNMENT * len(cache.layers)
