# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The window: exact softmax for what is near, the mixture for what is older, one normaliser for both."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache, Trainer

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMAMemory, GMAWindow
from gma_hf.modeling.cache_gma import counted
from tests.conftest import TINY, make_model, tiny_config
from tests.windows import BATCH, EXACT, HEAD_DIM, attend, goes_on, implied, part, problem, reference, rows


# Float32 sums in another order, through three layers
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.quick
@hypothesis_settings(max_examples=40)
@given(
    window=st.integers(1, 40),
    length=st.integers(1, 45),
    repeats=st.integers(1, 3),
    causal=st.booleans(),
    decay=st.booleans(),
    weight=st.booleans(),
    num_sinks=st.integers(0, 5),
)
def test_the_window_is_what_its_equations_say(window, length, repeats, causal, decay, weight, num_sinks):
    p = problem(window, length, repeats, decay and causal, weight, num_sinks=num_sinks)
    with torch.no_grad():
        torch.testing.assert_close(attend(p, causal=causal), reference(p, causal), **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize(("causal", "num_sinks"), [(True, 0), (True, 3), (False, 0)])
def test_routing_vectors_soft_cap_and_sinks(causal, num_sinks):
    p = problem(window=5, length=39, decay=causal, num_sinks=num_sinks)
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "routing_query": torch.randn(p.tokens["query"].shape, dtype=torch.float64, generator=generator),
        "routing_key": torch.randn(p.tokens["key"].shape, dtype=torch.float64, generator=generator),
        "softcap": 1.5,
        "sinks": torch.randn(4, dtype=torch.float64, generator=generator),
    }
    with torch.no_grad():
        torch.testing.assert_close(attend(p, causal=causal, **arguments), reference(p, causal, **arguments), **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize("num_sinks", [0, 2])
@pytest.mark.parametrize("weigh_by_routing", [False, True])
def test_token_by_token_every_option_counts(weigh_by_routing, num_sinks):
    p = problem(4, 13, num_sinks=num_sinks)
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.tokens[name].shape for name in ("query", "key")}
    tokens = dict(p.tokens)
    for name, shape in shapes.items():
        tokens[f"routing_{name}"] = torch.randn(shape, dtype=torch.float64, generator=generator)
    sinks = torch.randn(4, dtype=torch.float64, generator=generator)
    options = {"softcap": 0.7, "sinks": sinks, "weigh_by_routing": weigh_by_routing}
    expected = attend(p, tokens, **options)
    outputs, history = [], None
    for start in range(13):
        token = part(tokens, start, start + 1)
        output, history = attend(p, token, history=history, output_history=True, **options)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, **EXACT)


def test_a_window_over_everything_is_softmax_attention():
    p = problem(window=23, length=23)
    expected = torch.nn.functional.scaled_dot_product_attention(
        p.tokens["query"], p.tokens["key"], p.tokens["value"], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attend(p), expected, **EXACT)


def test_only_tokens_older_than_the_window_pass_through_the_memory():
    """With a memory that weighs nothing, no token beyond the window is seen; nor is any later one, ever."""
    p = problem(window=4, length=21)
    with torch.no_grad():
        p.window.memory_query.zero_()
        for bias, seen in ((-torch.inf, range(9, 13)), (0.0, range(13))):
            p.window.memory_bias.fill_(bias)
            value = p.tokens["value"].clone().requires_grad_()
            with torch.enable_grad():
                attend(p, {**p.tokens, "value": value})[:, :, 12].sum().backward()
            assert value.grad.abs().sum(dim=(0, 1, 3)).nonzero()[:, 0].tolist() == list(seen)


@pytest.mark.quick
@pytest.mark.parametrize("num_sinks", [0, 2])
def test_the_memory_does_not_outgrow_the_window(num_sinks):
    """Of equal tokens, a memory that becomes a mean (b = 1) gets no more than a bounded share, a sum (b = 0) ever more."""
    p = problem(window=4, length=900, decay=False, weight=False, num_sinks=num_sinks)
    tokens = {name: p.tokens[name][:, :, :1].expand(-1, -1, 900, -1) for name in ("query", "key")}
    dilution = torch.tensor([0.0, 0.4, 1.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        p.window.memory_dilution.copy_(dilution)
        affinity = implied(p, **tokens)
    counts = [46 - num_sinks, 896 - num_sinks]  # of the 50th and of the last query
    share = torch.stack([affinity[:, :, n + num_sinks + 3, num_sinks : num_sinks + n].sum(dim=-1) for n in counts])
    growth = torch.logit(share).diff(dim=0)[0]
    expected = math.log(counts[1] / counts[0]) - dilution * math.log((4 + counts[1]) / (4 + counts[0]))
    torch.testing.assert_close(growth, expected.expand_as(growth), **EXACT)
    # What is left to grow from n on is the part 1 / (1 + n / W)
    assert (growth[:, 2:] < 4 / counts[0]).all()


@pytest.mark.quick
def test_a_history_from_before_tokens_were_counted_goes_on():
    """Its window's b is 0, for which the number of tokens does not matter."""
    p = problem(window=4, length=20)
    with torch.no_grad():
        p.window.memory_dilution.zero_()
        _, history = attend(p, part(p.tokens, 0, 12), output_history=True)
        assert history.count == 8
        output, history = attend(p, part(p.tokens, 12, 17), history=history._replace(count=None), output_history=True)
        output = torch.cat([output, attend(p, part(p.tokens, 17, 20), history=history)], dim=2)
        torch.testing.assert_close(output, attend(p)[:, :, 12:], **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize(("causal", "num_sinks"), [(True, 0), (True, 2), (False, 0)])
@pytest.mark.parametrize(("window", "length"), [(3, 7), (9, 5), (2, 36)])
def test_gradients(window, length, causal, num_sinks):
    p = problem(window, length, decay=causal, num_sinks=num_sinks)
    inputs = {name: x.requires_grad_() for name, x in p.tokens.items() if x is not None}
    inputs["sinks"] = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[0, 1] = False
    ids = (torch.arange(length) > 2).long().expand(BATCH, -1)

    def function(*tensors, **arguments):
        tokens = dict(zip(inputs, tensors, strict=False))
        return attend(p, tokens, causal=causal, softcap=2.0, **arguments)

    tensors = (*inputs.values(), *p.mixture.parameters(), *p.window.parameters())
    for arguments in ({}, {"padding_mask": mask}, {"padding_mask": mask, "sequence_ids": ids}):
        assert torch.autograd.gradcheck(lambda *x, a=arguments: function(*x, **a), tensors, fast_mode=True)


@pytest.mark.quick
@pytest.mark.parametrize(("causal", "num_sinks"), [(True, 0), (True, 2), (False, 0)])
def test_the_affinity_is_what_the_window_computes(causal, num_sinks):
    p = problem(window=5, length=27, decay=causal, num_sinks=num_sinks)
    tokens = {name: x for name, x in p.tokens.items() if name != "value"}
    with torch.no_grad():
        affinity = implied(p, causal=causal, **tokens)
        output = attend(p, causal=causal)
    assert (affinity >= 0).all()
    torch.testing.assert_close(affinity.sum(-1), torch.ones_like(affinity[..., 0]), **EXACT)
    torch.testing.assert_close(affinity @ p.tokens["value"].repeat_interleave(2, dim=1), output, **EXACT)
    if causal:
        assert not affinity.triu(1).any()


@pytest.mark.quick
@hypothesis_settings(max_examples=100)
@given(
    window=st.integers(1, 6),
    splits=st.lists(st.integers(1, 19), min_size=1, max_size=5),
    padding=st.sampled_from(["anywhere", "left", "right", "none", "all"]),
    packed=st.booleans(),
    causal=st.booleans(),
    num_sinks=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_padding_packing_and_portions_change_nothing(window, splits, padding, packed, causal, num_sinks, seed):
    """Every sequence of every row equals the sequence alone, however the tokens arrive."""
    length = sum(splits)
    p = problem(window, length, decay=causal, seed=seed, num_sinks=num_sinks)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(BATCH, length, generator=generator) < 0.6
    if padding in ("left", "right"):
        mask = mask.sort(dim=1, descending=padding == "right").values
    elif padding != "anywhere":
        mask[:] = padding == "none"
    arguments = {"padding_mask": mask}
    ids = torch.zeros(BATCH, length, dtype=torch.long)
    if packed:
        ids = (torch.rand(BATCH, length, generator=generator) < 0.06).cumsum(dim=1)
        arguments["sequence_ids"] = ids
    with torch.no_grad():
        if causal:
            # A history belongs to the first sequence of the next portion: let no portion end with a sequence
            bounds = [0, *itertools.accumulate(splits)]
            bounds = [b for b in bounds if all(goes_on(ids[row], mask[row], b) for row in range(BATCH))]
            outputs, history = [], None
            for start, stop in itertools.pairwise(bounds):
                portion = {name: x[:, start:stop] for name, x in arguments.items()}
                output, history = attend(
                    p, part(p.tokens, start, stop), history=history, output_history=True, **portion
                )
                outputs.append(output)
            output = torch.cat(outputs, dim=2)
        else:
            output = attend(p, causal=False, **arguments)
        assert not output.transpose(1, 2)[~mask].any()
        for row in range(BATCH):
            for number in ids[row].unique():
                keep = (ids[row] == number) & mask[row]
                if keep.any():
                    alone = attend(p, rows(p.tokens, row, keep), causal=causal)
                    torch.testing.assert_close(output[row : row + 1, :, keep], alone, **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize("num_sinks", [0, 2])
def test_what_stands_at_padding_is_never_seen(num_sinks):
    p = problem(window=4, length=19, num_sinks=num_sinks)
    mask = torch.rand(BATCH, 19, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = attend(p, padding_mask=mask)
    poisoned = {
        name: x.masked_fill(~mask.view(BATCH, 1, 19, *[1] * (x.ndim - 3)), -torch.inf if name == "log_decay" else 1e6)
        for name, x in p.tokens.items()
    }
    torch.testing.assert_close(attend(p, poisoned, padding_mask=mask), expected, **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize("num_sinks", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_and_memories_stay_finite(dtype, num_sinks):
    """Logits beyond the range of exp, a memory that is nearly all or nearly nothing, and many equal tokens."""
    p = problem(window=4, length=300, decay=False, num_sinks=num_sinks)
    p.mixture.to(dtype), p.window.to(dtype)
    tokens = {name: x.to(torch.float32 if x.ndim == 3 else dtype) for name, x in p.tokens.items() if x is not None}
    tokens["write_weight"] = tokens["write_weight"] * 1e3
    limit = tokens["value"].abs().max() * 1.01
    for bias, scale in itertools.product((-1e4, 0.0, 1e4), (0.0, 1.0, 60.0)):
        with torch.no_grad():
            p.window.memory_bias.fill_(bias)
        inputs = {**tokens, "query": tokens["query"] * scale}
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        output = attend(p, leaves)
        assert output.dtype == dtype and output.isfinite().all() and (output.abs() <= limit).all()
        output.float().square().mean().backward()
        assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.quick
@pytest.mark.parametrize("num_sinks", [0, 2])
def test_bfloat16_is_as_exact_as_its_inputs(num_sinks):
    p = problem(window=8, length=120, decay=False, weight=False, num_sinks=num_sinks)
    low = {name: None if x is None else x.bfloat16() for name, x in p.tokens.items()}
    exact = {name: None if x is None else x.double() for name, x in low.items()}
    expected = attend(p, exact)
    p.mixture.float(), p.window.float()
    output = attend(p, low)
    # Roundings of 2^-9 each: of what the memory read, of the output and, before sinks join it, of what it was without them
    assert (output.double() - expected).norm() <= 3 * 2**-9 * expected.norm()


def without_invalid(history):
    """Zeros where no token is: what stands there is not looked at."""

    def clean(x):
        return x.masked_fill(~(history.valid[:, None, :, None] if x.ndim == 4 else history.valid[:, None]), 0)

    names = ("keys", "values", "write_weight", "log_decay")
    return history._replace(**{name: clean(getattr(history, name)) for name in names})


@pytest.mark.quick
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "num_sinks"), [(2, 0), (4, 0), (5, 0), (19, 0), (2, 3), (4, 3), (5, 3), (7, 3), (19, 3)]
)
def test_a_mask_without_padding_changes_nothing(length, num_sinks, packed):
    """Output, history and every gradient: without a mask, tokens are looked at where they are; with one, behind W others."""
    p = problem(window=4, length=length, num_sinks=num_sinks)
    ids = (torch.arange(length) * 3 // 10).expand(BATCH, -1) if packed else None
    results = []
    for mask in (None, torch.ones(BATCH, length, dtype=torch.bool)):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in p.tokens.items()}
        output, history = attend(p, leaves, padding_mask=mask, sequence_ids=ids, output_history=True)
        total = output.sin().sum() + history.state.sin().sum() + history.normalizer.sin().sum()
        parameters = (*p.mixture.parameters(), *p.window.parameters())
        grads = torch.autograd.grad(total, [*leaves.values(), *parameters])
        alone = attend(p, padding_mask=mask, sequence_ids=ids)
        tensors = (x for x in without_invalid(counted(history)) if isinstance(x, torch.Tensor))
        results.append((output, alone, *tensors, *grads))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.quick
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_whole_reaches_the_memory_without_a_copy(causal):
    p = problem(window=4, length=19, decay=causal)
    seen = []

    def spy(*states, **arguments):
        seen.extend((*states, arguments["write_weight"]))
        return p.mixture(*states, **arguments)

    GMAMemory()(spy, p.window, causal=causal, **p.tokens)
    given = (p.tokens[name] for name in ("query", "key", "value", "write_weight"))
    for x, whole in zip(seen, given, strict=True):
        assert x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert x.shape[2] == (15 if causal else 19)


@pytest.mark.quick
@pytest.mark.parametrize(("length", "num_sinks"), [(1, 0), (3, 0), (4, 0), (6, 2)])
def test_where_nothing_reaches_the_memory_all_parameters_have_a_gradient(length, num_sinks):
    """Which is zero, for the memory: distributed training waits for all of them."""
    p = problem(window=4, length=length, num_sinks=num_sinks)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in p.tokens.items()}
    attend(p, leaves).sin().sum().backward()
    of_memory = (*p.mixture.parameters(), *p.window.parameters(), leaves["write_weight"], leaves["log_decay"])
    assert all(not x.grad.any() for x in of_memory)


@pytest.mark.quick
def test_what_does_not_fit_is_refused():
    p = problem(window=4, length=6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GMAWindow(4, HEAD_DIM, 0)
    with pytest.raises(ValueError, match="have a direction; use causal=True"):
        attend(p, causal=False)
    with pytest.raises(ValueError, match=r"expected .* with 4 heads of dimension 4"):
        attend(p, {**p.tokens, "query": p.tokens["query"][:, :2]})
    _, history = attend(p, output_history=True)
    other = problem(window=3, length=6)
    with pytest.raises(ValueError, match="holds a window of 4 tokens, but `window_size` is 3"):
        attend(other, history=history)


MODELS = {
    "gated": {"num_key_value_heads": 2},
    "paper": {"position_embedding_type": "rope", "routing_dim": 12},
    "hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}


@pytest.fixture(params=MODELS)
def model(request):
    block = "paper" if request.param == "paper" else "gated"
    return make_model(gma_hf.GMAForCausalLM, tiny_config(block, **MODELS[request.param], window_size=4))


@pytest.mark.quick
@pytest.mark.parametrize("static", [False, True])
def test_models_with_a_window_read_tokens_in_any_portions(model, tokens, static):
    expected = model(tokens, use_cache=False).logits
    for splits in ([1] * 19, [2, 1, 16], [18, 1]):
        cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
        logits = [model(portion, **{CACHE_NAME: cache}).logits for portion in tokens.split(splits, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)


@pytest.mark.quick
@pytest.mark.parametrize("num_beams", [1, 3])
def test_models_with_a_window_generate_with_any_cache(model, tokens, num_beams):
    tokens[0, :8] = 0
    arguments = {"max_new_tokens": 9, "eos_token_id": None, "do_sample": False, "num_beams": num_beams}
    arguments["attention_mask"] = (tokens != 0).long()
    expected = model.generate(tokens, use_cache=False, **arguments)
    for implementation in (None, "static"):
        assert torch.equal(model.generate(tokens, cache_implementation=implementation, **arguments), expected)


@pytest.mark.quick
def test_a_model_with_a_window_over_everything_is_a_softmax_model(tokens):
    """The paper block with RoPE and a window as long as the text, beside the same weights in softmax layers."""
    values = {"position_embedding_type": "rope", "num_key_value_heads": 2}
    windowed = make_model(gma_hf.GMAForCausalLM, tiny_config("paper", window_size=19, **values))
    softmax = gma_hf.GMAForCausalLM(tiny_config("paper", layer_types=["full_attention"] * 3, **values)).eval()
    weights = {name: x for name, x in windowed.state_dict().items() if "_norm.me" not in name}
    softmax.load_state_dict({name: weights[name] for name in softmax.state_dict()})
    torch.testing.assert_close(windowed(tokens).logits, softmax(tokens).logits, **TOLERANCE)


@pytest.mark.quick
def test_the_cache_of_a_window_has_a_constant_size_and_holds_nothing_else(tokens):
    model = make_model(gma_hf.GMAModel, tiny_config(window_size=4)).bfloat16()
    sizes = set()
    for length in (1, 3, 19):
        history = model(tokens[:, :length], use_cache=True)[CACHE_NAME].layers[0].memory
        assert history.state.dtype == history.normalizer.dtype == torch.float32
        assert history.keys.dtype == history.values.dtype == torch.bfloat16
        # The memory that is held, not what is looked at
        sizes.add(sum(x.untyped_storage().nbytes() for x in history if isinstance(x, torch.Tensor)))
    assert len(sizes) == 1


@pytest.mark.quick
def test_weights_and_prompts_survive_disk(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded = gma_hf.GMAForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    path = tmp_path / "prompt.safetensors"
    gma_hf.save_cache(model(tokens[:, :12], use_cache=True)[CACHE_NAME], path)
    logits = reloaded(tokens[:, 12:], **{CACHE_NAME: gma_hf.load_cache(path, reloaded.config)}).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, 12:], **TOLERANCE)
    for window_size in (0, 3):
        with pytest.raises(ValueError, match="does not fit the model"):
            gma_hf.load_cache(
                path, type(model.config).from_dict({**model.config.to_dict(), "window_size": window_size})
            )


@pytest.mark.quick
def test_the_window_starts_neutral_and_takes_no_weight_decay():
    model = gma_hf.GMAForCausalLM(tiny_config(window_size=4))
    window = model.model.layers[0].self_attn.window_norm
    assert not any(parameter.any() for parameter in window.parameters())
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert any("q_proj" in name for name in decayed) and not any("window_norm" in name for name in decayed)


def test_models_with_a_window_compile_in_one_graph_and_decode_without_recompilation(tokens):
    torch._dynamo.reset()
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("paper", window_size=4, num_hidden_layers=2))
    counter = CompileCounter()
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    steps = torch.randint(3, TINY["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(4))
    expected = model(torch.cat([tokens, steps], dim=1), use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(step(tokens, use_cache=False).logits, expected[:, :19], **TOLERANCE)
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(tokens, **{CACHE_NAME: cache})
        compilations = []
        for position in range(8):
            arguments = {CACHE_NAME: cache, "position_ids": torch.full((2, 1), 19 + position)}
            logits = step(steps[:, position : position + 1], **arguments).logits
            torch.testing.assert_close(logits[:, 0], expected[:, 19 + position], **TOLERANCE)
            compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1
    torch._dynamo.reset()
