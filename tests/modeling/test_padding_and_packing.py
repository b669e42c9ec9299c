# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Padding, wherever it stands, changes nothing for real tokens; packed sequences equal separate ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, StaticCache

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling.layout import count_positions, find_sequence_ids
from tests.conftest import BLOCKS, TINY, make_model, tiny_config


# Float32 sums in another order: a few units of 2^-23 relative to activations of order one, through three layers
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}

PADDINGS = {
    "left": lambda row: [0, 0, 0, 0, 0, *row],
    "right": lambda row: [*row, 0, 0, 0, 0, 0],
    "between": lambda row: [*row[:3], 0, *row[3:5], 0, 0, *row[5:]],
    "everywhere": lambda row: [0, 0, *row[:4], 0, *row[4:], 0, 0],
}


def pad_row(row: torch.Tensor, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    padded = torch.tensor([PADDINGS[where](row.tolist())])
    return padded, (padded != 0).long()


@pytest.mark.quick
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("where", PADDINGS)
def test_padding_never_changes_a_real_tokens_output(where, is_causal, block, tokens):
    model = make_model(gma_hf.GMAModel, tiny_config(block, is_causal=is_causal))
    row = tokens[0, :9]
    padded, mask = pad_row(row, where)
    # Whatever stands at the padding
    padded = torch.where(mask == 1, padded, torch.randint_like(padded, 3, TINY["vocab_size"]))
    expected = model(row[None])[0][0]
    torch.testing.assert_close(model(padded, attention_mask=mask)[0][mask == 1], expected, **TOLERANCE)
    # With positions that count real tokens, as `generate` makes them, and a mask of another type
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = model(padded, attention_mask=mask.bool(), position_ids=positions)[0]
    torch.testing.assert_close(outputs[mask == 1], expected, **TOLERANCE)


@pytest.mark.quick
@pytest.mark.parametrize("where", PADDINGS)
def test_padding_never_changes_a_gradient(where, block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block, pad_token_id=None))
    row = tokens[0, :9]
    model.model(row[None])[0].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.model.named_parameters()}
    model.zero_grad()
    padded, mask = pad_row(row, where)
    model.model(padded, attention_mask=mask)[0][mask == 1].square().sum().backward()
    for name, parameter in model.model.named_parameters():
        scale = expected[name].abs().max()
        # Gradients are sums over tokens: compared on their own scale
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.quick
@pytest.mark.parametrize("head", [gma_hf.GMAForSequenceClassification, gma_hf.GMAForCausalLM])
def test_a_batch_equals_its_rows(head, block, tokens):
    model = make_model(head, tiny_config(block))
    short, long = tokens[0, :7], tokens[1]
    batch = torch.zeros(2, 19, dtype=torch.long)
    batch[0, :7], batch[1] = short, long
    logits = model(batch, attention_mask=(batch != 0).long()).logits
    expected = model(short[None]).logits
    torch.testing.assert_close(logits[:1, :7] if logits.ndim == 3 else logits[:1], expected, **TOLERANCE)


PACKINGS = {
    "position_ids": lambda lengths: {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
    "cu_seq_lens_q": lambda lengths: {
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    },
    "seq_idx": lambda lengths: {
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(torch.int32)
    },
}


@pytest.mark.quick
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("announced_by", PACKINGS)
def test_packed_sequences_equal_separate_ones(announced_by, is_causal, block, tokens):
    model = make_model(gma_hf.GMAModel, tiny_config(block, is_causal=is_causal))
    lengths = [5, 1, 2, 11]
    row = tokens[:1]
    expected = torch.cat([model(part)[0] for part in row.split(lengths, dim=1)], dim=1)
    for use_cache in (False, True):
        outputs = model(row, use_cache=use_cache, **PACKINGS[announced_by](lengths))[0]
        torch.testing.assert_close(outputs, expected, **TOLERANCE)


def test_a_long_packed_row_equals_separate_sequences(block):
    """Longer than any chunk of the operator, boundaries wherever they fall."""
    model = make_model(gma_hf.GMAModel, tiny_config(block, max_position_embeddings=400))
    lengths = [1, 63, 64, 65, 127, 3, 200]
    row = torch.randint(3, TINY["vocab_size"], (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    expected = torch.cat([model(part)[0] for part in row.split(lengths, dim=1)], dim=1)
    outputs = model(row, **PACKINGS["position_ids"](lengths))[0]
    torch.testing.assert_close(outputs, expected, **TOLERANCE)


def test_the_flattening_collator_of_transformers_works(tokens, block):
    """Padding-free training: same loss as the padded batch."""
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    rows = [{"input_ids": tokens[0, :8].tolist()}, {"input_ids": tokens[1].tolist()}]
    labels = torch.zeros(2, 19, dtype=torch.long)
    labels[0, :8], labels[1] = tokens[0, :8], tokens[1]
    mask = (labels != 0).long()
    expected = model(labels, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100)).loss
    # The last is what TRL's SFTTrainer sends
    for arguments in (
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    ):
        batch = DataCollatorWithFlattening(return_tensors="pt", **arguments)(rows)
        torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_packed_rows_may_also_be_padded(tokens, block):
    model = make_model(gma_hf.GMAModel, tiny_config(block))
    row = tokens[:1, :12]
    expected = torch.cat([model(part)[0] for part in row.split([5, 7], dim=1)], dim=1)
    padded = torch.cat(
        [row[:, :5], torch.zeros(1, 2, dtype=torch.long), row[:, 5:], torch.zeros(1, 3, dtype=torch.long)], 1
    )
    mask = (padded != 0).long()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0]])
    outputs = model(padded, attention_mask=mask, position_ids=positions)[0]
    torch.testing.assert_close(outputs[mask == 1], expected[0], **TOLERANCE)


@pytest.mark.quick
def test_a_mask_per_pair_of_tokens_is_refused(tokens):
    model = make_model(gma_hf.GMAModel, tiny_config("gated"))
    with pytest.raises(ValueError, match=r"2D attention mask .* got shape \(2, 1, 19, 19\)"):
        model(tokens, attention_mask=torch.ones(2, 1, 19, 19))


@pytest.mark.quick
def test_boundaries_of_several_rows_are_refused(tokens):
    model = make_model(gma_hf.GMAModel, tiny_config("gated"))
    with pytest.raises(ValueError, match="packed into one row, got a batch of 2"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 5, 19]))


@pytest.mark.quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_sequences_are_found_under_any_padding(lengths, data):
    """Positions, sequence numbers and boundaries tell the same story, padding or not."""
    true_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    true_positions = torch.cat([torch.arange(n) for n in lengths])
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(true_ids), max_size=len(true_ids)))
    is_real, positions, seq_idx = [], [], []
    for gap, position, number in zip(gaps, true_positions.tolist(), true_ids.tolist(), strict=True):
        is_real += [False] * gap + [True]
        positions += [0] * gap + [position]
        seq_idx += [-1] * gap + [number]
    is_real = torch.tensor([is_real])
    for announced in ({"position_ids": torch.tensor([positions])}, {"seq_idx": torch.tensor([seq_idx])}):
        found = find_sequence_ids(1, is_real.shape[1], is_real, **announced)
        found = torch.zeros_like(is_real, dtype=torch.long) if found is None else found
        assert torch.equal(found[is_real], true_ids)
        counted = count_positions(1, is_real.shape[1], torch.device("cpu"), is_real, found)
        assert torch.equal(counted[is_real], true_positions)


@hypothesis_settings(max_examples=15)
@given(st.sampled_from(sorted(BLOCKS)), st.lists(st.booleans(), min_size=12, max_size=12), st.integers(0, 12))
def test_padding_and_continuation_together(block, real, split):
    """Any padding, processed in two calls with the cache, equals the real tokens at once."""
    if not any(real):
        return
    model = make_model(gma_hf.GMAModel, tiny_config(block))
    tokens = torch.randint(3, TINY["vocab_size"], (1, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([real]).long()
    expected = model(tokens[:, mask[0] == 1])[0][0]
    outputs, cache = [], None
    for part in (slice(0, split), slice(split, 12)):
        if part.start < part.stop:
            result = model(tokens[:, part], attention_mask=mask[:, : part.stop], **{CACHE_NAME: cache}, use_cache=True)
            outputs.append(result.last_hidden_state)
            cache = result[CACHE_NAME]
    torch.testing.assert_close(torch.cat(outputs, 1)[mask == 1], expected, **TOLERANCE)


WRONG_MASKS = {
    "too long": torch.ones(2, 30),
    "too short": torch.ones(2, 5),
    "of one row": torch.ones(1, 19),
    "of other rows": torch.ones(3, 19),
}


@pytest.mark.quick
@pytest.mark.parametrize("mask", WRONG_MASKS.values(), ids=list(WRONG_MASKS))
def test_a_mask_of_another_shape_than_the_tokens_is_refused(mask, block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    with pytest.raises(ValueError, match="The attention mask has shape"):
        model(tokens[:2, :19], attention_mask=mask)


@pytest.mark.quick
def test_a_mask_cannot_take_back_what_the_cache_has_read(block, tokens):
    """Nor can positions that the cache has passed, nor other rows."""
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    cache = model(tokens[:2, :12], use_cache=True)[CACHE_NAME]
    mask = torch.ones(2, 14)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="marks tokens as padding that the cache has read"):
        model(tokens[:2, 12:14], attention_mask=mask, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="start at 5, but the cache has seen 12 tokens"):
        model(tokens[:2, 12:14], position_ids=torch.tensor([[5, 6]]), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="The cache has 2 rows, but 1 rows of tokens"):
        model(tokens[:1, 12:14], **{CACHE_NAME: cache})
    # Refused calls leave the cache as it was
    expected = model(tokens[:2, :14]).logits[:, 12:]
    mask = torch.ones(2, 14)
    torch.testing.assert_close(
        model(tokens[:2, 12:14], attention_mask=mask, **{CACHE_NAME: cache}).logits, expected, **TOLERANCE
    )


@pytest.mark.quick
def test_a_mask_may_be_as_long_as_a_static_cache(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    row, expected = tokens[:1, :9], model(tokens[:1, :9]).logits
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
    mask = torch.zeros(1, 32, dtype=torch.long)
    cache, outputs = StaticCache(config=model.config, max_cache_len=32), []
    for first, last in ((0, 5), (5, 6), (6, 12)):
        mask[:, max(first, 3) : last] = 1
        outputs.append(model(padded[:, first:last], attention_mask=mask, **{CACHE_NAME: cache}).logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1)[:, 3:], expected, **TOLERANCE)


@pytest.mark.quick
@pytest.mark.parametrize("boundaries", [[0, 4, 9], [3, 8, 12], [0, 8, 4, 12]])
def test_boundaries_that_do_not_divide_the_tokens_are_refused(boundaries, block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must begin with 0"):
        model(tokens[:1, :12], cu_seq_lens_q=torch.tensor(boundaries))


@pytest.mark.quick
def test_a_sequence_stands_in_one_piece(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    with pytest.raises(ValueError, match="returns to the number of an earlier sequence"):
        model(tokens[:1, :6], seq_idx=torch.tensor([[0, 0, 1, 1, 0, 0]]))
    # Numbers may be any, and padding may have any
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])
    model(tokens[:1, :6], seq_idx=torch.tensor([[9, 5, 5, 9, 3, 3]]), attention_mask=mask)


def test_positions_below_zero_are_refused_where_they_are_learned(tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("paper"))
    with pytest.raises(ValueError, match="Positions begin at 0, got -5"):
        model(tokens[:1, :4], position_ids=torch.arange(4)[None] - 5)
