# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Whatever form a mask has, converted layers read padding and packed sequences from it, and refuse what they cannot do."""

import copy

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import and_masks, causal_mask_function, or_masks

from gma_hf import gma_layers
from gma_hf.conversion.runtime.attention import gma_attention_forward
from gma_hf.conversion.runtime.masks import gaussian_mixture_mask, read_mask
from tests.conversion.tiny_models import make_converted_model, make_inputs, output_of


CLOSE = {"rtol": 1e-4, "atol": 5e-5}
LENGTH = 13
# Three sequences of 4, 6 and 3 tokens in one row
SEQUENCES = torch.tensor([[0] * 4 + [1] * 6 + [2] * 3])
POSITIONS = torch.cat([torch.arange(n) for n in (4, 6, 3)])[None]


@pytest.fixture(params=[{}, {"layers": [0]}, {"window_size": 3}], ids=["all", "hybrid", "windowed"])
def model(request):
    return make_converted_model("llama", **request.param)


@pytest.fixture
def tokens():
    return make_inputs("llama", batch_size=1, length=LENGTH)["input_ids"]


def causal(length: int = LENGTH) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.quick
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "bert", "modernbert"])
def test_masks_stay_linear_in_the_length_where_no_softmax_is_left(model_type):
    model = make_converted_model(model_type)
    seen = []

    def look(module, args, kwargs):
        masks = [value for name, value in kwargs.items() if name == "attention_mask"]
        seen.extend(masks or [argument for argument in args[1:] if isinstance(argument, torch.Tensor)])

    for name in gma_layers(model):
        model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
    tokens = make_inputs(model_type)["input_ids"]
    mask = torch.ones_like(tokens)
    output_of(model, input_ids=tokens, attention_mask=mask)
    assert all(one is None for one in seen)
    mask[0, -3:] = 0
    seen.clear()
    output_of(model, input_ids=tokens, attention_mask=mask)
    assert len(seen) == 2 and all(torch.equal(one, mask != 0) for one in seen)


@pytest.mark.quick
@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["boolean", "additive"])
def test_a_mask_of_pairs_that_says_padding(model, tokens, form):
    padding = torch.ones(1, LENGTH, dtype=torch.bool)
    padding[:, :4] = False
    positions = (padding.long().cumsum(1) - 1).clamp(min=0)
    expected = output_of(model, input_ids=tokens, attention_mask=padding.long(), position_ids=positions)
    pairs = form(causal() & padding[:, None, None, :])
    output = output_of(model, input_ids=tokens, attention_mask=pairs, position_ids=positions)
    torch.testing.assert_close(output[padding], expected[padding], **CLOSE)


@pytest.mark.quick
@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["boolean", "additive"])
def test_a_mask_of_pairs_that_says_packing(model, tokens, form):
    expected = output_of(model, input_ids=tokens, position_ids=POSITIONS, use_cache=False)
    pairs = form(causal() & (SEQUENCES[:, None, :, None] == SEQUENCES[:, None, None, :]))
    output = output_of(model, input_ids=tokens, attention_mask=pairs, position_ids=POSITIONS, use_cache=False)
    torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.quick
@pytest.mark.parametrize(
    "options", [{}, {"window_size": 3}, {"undo_rotation": False}], ids=["plain", "windowed", "rotated"]
)
def test_packing_may_be_told_as_to_flash_attention(options, tokens):
    model = make_converted_model("llama", **options)
    expected = output_of(model, input_ids=tokens, position_ids=POSITIONS, use_cache=False)
    lengths = torch.tensor([0, 4, 10, 13], dtype=torch.int32)
    for announced in ({"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}, {"seq_idx": SEQUENCES}):
        for positions in ({"position_ids": POSITIONS}, {}):
            output = output_of(model, input_ids=tokens, **positions, **announced)
            torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.quick
def test_packing_is_read_from_positions_where_flash_attention_would(tokens):
    """Its masks do not tell packed sequences apart, so layers beside softmax layers that use it look where it looks."""
    module = make_converted_model("llama", layers=[0], undo_rotation=False).model.layers[0].self_attn
    states = torch.randn(3, 1, 4, LENGTH, 8, generator=torch.Generator().manual_seed(2))
    expected, _ = gma_attention_forward(module, *states, None, seq_idx=SEQUENCES)
    assert not torch.equal(gma_attention_forward(module, *states, None, position_ids=POSITIONS)[0], expected)
    module.softmax_config = copy.copy(module.softmax_config)
    module.softmax_config._attn_implementation_internal = "flash_attention_2"
    assert torch.equal(gma_attention_forward(module, *states, None, position_ids=POSITIONS)[0], expected)


@pytest.mark.quick
def test_masks_that_a_mixture_cannot_follow_are_refused(model, tokens):
    prefix = causal()
    prefix[..., :4] = True
    hole = causal()
    hole[..., 9, 5] = False
    bias = additive(causal()) - 0.5 * torch.arange(LENGTH)
    for mask in (prefix, hole, bias):
        with pytest.raises(ValueError, match="says more about pairs of tokens"):
            model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="mask per head"):
        model(tokens, attention_mask=causal().expand(1, 4, -1, -1))


@pytest.mark.quick
@pytest.mark.parametrize("use_vmap", [False, True])
def test_the_mask_function_finds_sequences_and_directions(use_vmap):
    arguments = {"batch_size": 1, "q_length": LENGTH, "kv_length": LENGTH, "use_vmap": use_vmap}

    def same_sequence(batch_idx, head_idx, q_idx, kv_idx):
        return SEQUENCES[batch_idx, q_idx] == SEQUENCES[batch_idx, kv_idx]

    assert gaussian_mixture_mask(**arguments) is None
    for function in (and_masks(causal_mask_function, same_sequence), same_sequence):
        mask = gaussian_mixture_mask(**arguments, mask_function=function)
        assert torch.equal(mask, SEQUENCES + 1)
    # A token of padding within the second sequence
    padding = torch.ones(1, LENGTH, dtype=torch.bool)
    padding[0, 6] = False
    mask = gaussian_mixture_mask(**arguments, mask_function=same_sequence, attention_mask=padding)
    assert torch.equal(mask, (SEQUENCES + 1) * padding)

    def image_tokens(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx < 5) & (kv_idx < 5)

    with pytest.raises(ValueError, match="either causal or bidirectional"):
        gaussian_mixture_mask(**arguments, mask_function=or_masks(causal_mask_function, image_tokens))


@pytest.mark.quick
def test_the_current_tokens_are_read_from_a_mask_that_covers_the_cache():
    query = torch.zeros(1, 2, 3, 4)
    mask = torch.tensor([[0, 1, 1, 1, 0, 1]])
    expected = torch.tensor([[True, False, True]])
    pairs = torch.ones(1, 1, 3, 6, dtype=torch.bool).tril(3) & (mask != 0)[:, None, None]
    blocks = create_block_mask(lambda b, h, i, j: pairs[b, 0, i, j], B=1, H=None, Q_LEN=3, KV_LEN=6, device="cpu")
    for form in (mask, mask != 0, pairs, additive(pairs), blocks):
        padding_mask, sequence_ids = read_mask(form, query)
        assert torch.equal(padding_mask, expected) and sequence_ids is None
    with pytest.raises(ValueError, match="covers 2 tokens, but 3 tokens were given"):
        read_mask(mask[:, :2], query)
