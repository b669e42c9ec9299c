# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What one call says stays with the call: threads share a model, packed sequences stay apart, nothing is kept alive."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import VOCAB, make_converted_model, make_inputs, make_softmax_model, output_of


CLOSE = {"rtol": 1e-4, "atol": 5e-5}
LENGTHS = (4, 6, 3)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SEQUENCES = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
BOUNDS = torch.tensor([0, 4, 10, 13], dtype=torch.int32)
KINDS = {
    "all": {},
    "windowed": {"window_size": 3, "num_sink_tokens": 1, "use_forgetting": True},
    "one layer kept": {"layers": [0]},
    "one windowed, one kept": {"layers": [1], "window_size": 3},
}


@pytest.fixture
def tokens():
    return make_inputs("llama", batch_size=1, length=13)["input_ids"]


def run_in_threads(model, work, num_threads=4):
    """Results of `work(i)`, called by threads that switch as often as they can."""
    results, interval = {}, sys.getswitchinterval()

    def run(i):
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num_threads)]
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return [results[i] for i in range(num_threads)]


@pytest.mark.quick
@pytest.mark.parametrize(
    "kind", [*KINDS, "native", "native, windowed", "native, hybrid", "gemma2", "gpt2", "qwen2", "gpt_oss"]
)
def test_threads_that_share_a_model_write_the_texts_that_each_writes_alone(kind):
    if kind.startswith("native"):
        block = {"native": "gated", "native, windowed": "windowed", "native, hybrid": "hybrid"}[kind]
        model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    elif kind in KINDS:
        model = make_converted_model("llama", **KINDS[kind])
    else:
        model = make_converted_model(kind, window_size=3)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCAB, (1, 9 + i), generator=generator) for i in range(4)]

    def write(i):
        arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return [model.generate(prompts[i], **arguments) for _ in range(2)]

    alone = [write(i) for i in range(4)]
    for texts, expected in zip(run_in_threads(model, write), alone, strict=True):
        assert not isinstance(texts, Exception), texts
        assert all(torch.equal(x, y) for x, y in zip(texts, expected, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("told", ["position_ids", "seq_idx", "cu_seq_lens_q", "all"])
def test_packed_sequences_never_meet_however_they_are_told(kind, use_cache, has_mask, told, tokens):
    model = make_converted_model("llama", **KINDS[kind])
    alone = [output_of(model, input_ids=part, use_cache=False) for part in tokens.split(LENGTHS, dim=1)]
    ways = {
        "position_ids": {"position_ids": POSITIONS},
        "seq_idx": {"seq_idx": SEQUENCES},
        "cu_seq_lens_q": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS},
    }
    arguments = {name: x for way in ways.values() for name, x in way.items()} if told == "all" else ways[told]
    if use_cache is not None:
        arguments = {**arguments, "use_cache": use_cache}
    if has_mask:
        arguments = {**arguments, "attention_mask": torch.ones_like(tokens)}
    output = output_of(model, input_ids=tokens, **arguments)
    torch.testing.assert_close(output, torch.cat(alone, dim=1), **CLOSE)


@pytest.mark.quick
@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "qwen2", "gpt2", "smollm3"])
@pytest.mark.parametrize("options", [{}, {"layers": [0]}, {"layers": [1], "window_size": 3}])
def test_families_keep_packed_sequences_apart_with_the_cache_that_they_make(model_type, options, tokens):
    model = make_converted_model(model_type, **options)
    alone = [output_of(model, input_ids=part) for part in tokens.split(LENGTHS, dim=1)]
    output = output_of(model, input_ids=tokens, position_ids=POSITIONS)
    torch.testing.assert_close(output, torch.cat(alone, dim=1), **CLOSE)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_goes_on_with_the_last_of_the_packed_sequences(kind, tokens):
    model = make_converted_model("llama", **KINDS[kind])
    if "kept" in kind:
        cache = model(tokens, position_ids=POSITIONS, use_cache=True)[CACHE_NAME]
        with pytest.raises(ValueError, match="cannot go on from a cache with several packed sequences"):
            model(tokens[:, :5], position_ids=torch.tensor([[3, 4, 0, 1, 2]]), **{CACHE_NAME: cache})
        return
    cache = model(tokens, position_ids=POSITIONS, use_cache=True)[CACHE_NAME]
    expected = output_of(model, input_ids=torch.cat([tokens[:, 10:], tokens[:, :2]], dim=1))[:, 3:]
    got = output_of(model, input_ids=tokens[:, :2], position_ids=torch.tensor([[3, 4]]), **{CACHE_NAME: cache})
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["all", "one layer kept", "native"])
@pytest.mark.parametrize("static", [False, True])
def test_a_chunk_that_starts_anew_behind_a_cache_is_refused(kind, static, tokens):
    native = kind == "native"
    model = (
        make_model(gma_hf.GMAForCausalLM, tiny_config("windowed"))
        if native
        else make_converted_model("llama", **KINDS[kind])
    )
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :6], **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="A new sequence needs a new cache"):
            model(tokens[:, 6:], **{CACHE_NAME: cache}, position_ids=torch.arange(7)[None])
        model(tokens[:, 6:], **{CACHE_NAME: cache}, position_ids=torch.arange(6, 13)[None])


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["all", "windowed", "one layer kept"])
def test_masks_that_a_mixture_cannot_follow_are_refused_wherever_they_come(kind, tokens):
    """As a fresh tensor and as one that was changed in place, behind a cache, with a static cache."""
    model = make_converted_model("llama", **KINDS[kind])
    lowest = torch.finfo(torch.float32).min
    causal = torch.zeros(1, 1, 13, 13).masked_fill(~torch.ones(13, 13, dtype=torch.bool).tril(), lowest)
    refused = {"match": "says more about pairs of tokens"}

    def prefixed(mask):
        mask[..., -5:-2, -5:-2] = True if mask.dtype == torch.bool else 0
        return mask

    def biased(mask):
        return torch.where(mask == 0, -torch.arange(mask.shape[-1]) * 0.5, mask)

    with torch.no_grad():
        mask = causal.clone()
        expected = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(expected, model(tokens).logits, **CLOSE)
        prefixed(mask)
        for one in (mask, mask == 0, biased(causal)):
            with pytest.raises(ValueError, **refused):
                model(tokens, attention_mask=one)
        cache = model(tokens[:, :4], use_cache=True)[CACHE_NAME]
        for one in (prefixed(causal.clone()), biased(causal)):
            with pytest.raises(ValueError, **refused):
                model(tokens[:, 4:], attention_mask=one[:, :, 4:], **{CACHE_NAME: cache})
        got = model(tokens[:, 4:], attention_mask=causal[:, :, 4:], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(got, expected[:, 4:], **CLOSE)
        wide = torch.nn.functional.pad(prefixed(causal.clone()), (0, 3), value=lowest)
        with pytest.raises(ValueError, **refused):
            model(tokens, attention_mask=wide, **{CACHE_NAME: StaticCache(config=model.config, max_cache_len=16)})


@pytest.mark.quick
@pytest.mark.parametrize("kind", [*KINDS, "native"])
def test_after_an_error_the_model_keeps_no_cache_alive(kind, tokens):
    model = (
        make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
        if kind == "native"
        else make_converted_model("llama", **KINDS[kind])
    )
    expected = output_of(model, input_ids=tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, **{CACHE_NAME: cache})
    layers = [weakref.ref(layer) for layer in cache.layers]

    def fail(module, arguments):
        raise RuntimeError("out of memory")

    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens[:, :1], **{CACHE_NAME: cache})
    handle.remove()
    del cache
    gc.collect()
    assert all(layer() is None for layer in layers)
    assert torch.equal(output_of(model, input_ids=tokens), expected)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["all", "one layer kept", "native"])
def test_continuous_batching_is_refused_by_name(kind):
    model = (
        make_model(gma_hf.GMAForCausalLM, tiny_config("gated"))
        if kind == "native"
        else make_converted_model("llama", **KINDS[kind])
    )
    for start in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"GMA layers .* continuous batching"):
            start([[5, 6, 7]])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["all", "windowed", "one layer kept"])
def test_masks_that_contradict_the_tokens_or_the_cache_are_refused(model_type, kind, tokens):
    options = {name: value for name, value in KINDS[kind].items() if model_type == "llama" or name != "use_forgetting"}
    model = make_converted_model(model_type, **options)
    for shape in ((1, 30), (1, 5), (2, 13), (1, 13, 13)):
        with pytest.raises(ValueError, match="mask"):
            model(tokens, attention_mask=torch.ones(shape))
    with torch.no_grad():
        cache = model(tokens[:, :8], use_cache=True)[CACHE_NAME]
    hidden = torch.ones(1, 13)
    hidden[:, 2:4] = 0
    pairs = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril()[:, :, 8:] & hidden.bool()
    for mask in (hidden, pairs):
        with pytest.raises(ValueError, match="mask"):
            model(tokens[:, 8:], attention_mask=mask, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="start at 3, but the cache has seen 8 tokens"):
        model(tokens[:, 8:], position_ids=torch.arange(3, 8)[None], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="The cache has 1 rows"):
        model(tokens[:, 8:].expand(2, -1), **{CACHE_NAME: cache})


@torch.no_grad()
def test_a_softmax_model_does_not_read_the_cache_of_a_converted_one(tokens):
    """The state has no keys and values: the model would begin a new text without a word."""
    cache = make_converted_model("llama")(tokens, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="no keys and values for softmax attention"):
        make_softmax_model("llama")(tokens[:, :1], **{CACHE_NAME: cache})
