# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A cache in a file belongs to the model that wrote it: every other model, and every damaged file, is refused by name."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import make_converted_model


pytestmark = pytest.mark.quick
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


@pytest.fixture
def tokens():
    return torch.randint(3, 99, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["paper", "gated", "windowed", "hybrid"])
def block(request):
    return request.param


@pytest.fixture
def model(block):
    return make_model(gma_hf.GMAForCausalLM, tiny_config(block))


@pytest.fixture
def path(model, tokens, tmp_path):
    path = tmp_path / "prompt.safetensors"
    gma_hf.save_cache(model(tokens[:, :12], use_cache=True)[CACHE_NAME], path)
    return path


def rewrite(path, tensors=None, **metadata):
    """The same file with other entries; `None` takes an entry out."""
    with safe_open(path, "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}
        entries = {**file.metadata(), **metadata}
    save_file({**old, **(tensors or {})}, path, {name: value for name, value in entries.items() if value is not None})


def test_the_checkpoint_that_wrote_it_goes_on(model, path, tokens, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = model(tokens).logits[:, 12:]
    for given in (model, again, again.config, again.model):
        logits = again(tokens[:, 12:], **{CACHE_NAME: gma_hf.load_cache(path, given)}).logits
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("change", ["another seed", "one step of training", "another dtype"])
def test_other_weights_of_the_same_shapes_are_refused(model, block, path, tokens, change):
    other = make_model(gma_hf.GMAForCausalLM, tiny_config(block), seed=0)
    if change == "another seed":
        other = make_model(gma_hf.GMAForCausalLM, tiny_config(block), seed=1)
    elif change == "another dtype":
        other = other.to(torch.bfloat16)
    else:
        other(tokens, labels=tokens).loss.backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match="does not fit the model: other weights"):
        gma_hf.load_cache(path, other)
    # A configuration knows no weights: the first call compares them
    cache = gma_hf.load_cache(path, other.config)
    with pytest.raises(ValueError, match="does not fit the model: other weights"):
        other(tokens[:, 12:], **{CACHE_NAME: cache})


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_a_model_of_another_depth_is_refused(block, path, num_layers):
    types = {"layer_types": ["linear_attention"] * num_layers} if block == "hybrid" else {}
    config = tiny_config(block, num_hidden_layers=num_layers, **types)
    with pytest.raises(ValueError, match=f"the file has 3 layers, the model has {num_layers}"):
        gma_hf.load_cache(path, config)


@pytest.mark.parametrize("value", ["abc", "-5", "1.5", "", None])
@pytest.mark.parametrize("entry", ["seq_length", "num_layers"])
def test_nonsense_beside_the_tensors_is_refused_by_the_name_of_the_file(model, path, entry, value):
    rewrite(path, **{entry: value})
    with pytest.raises(ValueError, match=rf"prompt\.safetensors is damaged.*{entry}"):
        gma_hf.load_cache(path, model.config)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_refused(model, path, number):
    with safe_open(path, "pt") as file:
        state = file.get_tensor("layers.0.state")
    state[0, 0, 0, 0] = number
    rewrite(path, {"layers.0.state": state})
    with pytest.raises(ValueError, match=r"prompt\.safetensors holds NaN or infinite numbers"):
        gma_hf.load_cache(path, model.config)


def test_files_that_are_no_cache_are_refused_by_name(model, path, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:200])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").touch()
    for name in ("cut", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged"):
            gma_hf.load_cache(tmp_path / f"{name}.safetensors", model.config)
    with pytest.raises(FileNotFoundError, match="none"):
        gma_hf.load_cache(tmp_path / "none.safetensors", model.config)


def test_what_cannot_be_the_file_of_a_cache_is_named(model, path, tokens, tmp_path):
    cache = model(tokens[:, :12], use_cache=True)[CACHE_NAME]
    for place, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "file", "There is no folder"),
        (3, "got 3"),
        ("", "''"),
    ):
        with pytest.raises(ValueError, match=message):
            gma_hf.save_cache(cache, place)
        with pytest.raises(ValueError, match=message):
            gma_hf.load_cache(place, model)
    with pytest.raises(ValueError, match="`device` must name a device"):
        gma_hf.load_cache(path, model, device="nonsense")


@torch.no_grad()
def test_another_model_of_the_same_shapes_is_refused_in_memory_too(model, block, tokens):
    other = make_model(gma_hf.GMAForCausalLM, tiny_config(block), seed=1)
    cache = model(tokens[:, :12], use_cache=True)[CACHE_NAME]
    for filled in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match="The cache does not fit the model: other weights"):
            other(tokens[:, 12:], **{CACHE_NAME: filled})
    # A copy of the model has the same weights, whoever filled the cache
    logits = copy.deepcopy(model)(tokens[:, 12:], **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, 12:], **CLOSE)


def test_a_static_cache_serves_another_model_after_its_reset(model, block, tokens):
    other = make_model(gma_hf.GMAForCausalLM, tiny_config(block), seed=1)
    cache = StaticCache(config=model.config, max_cache_len=64)
    expected = other(tokens).logits
    model(tokens[:, :12], **{CACHE_NAME: cache})
    cache.reset()
    torch.testing.assert_close(other(tokens, **{CACHE_NAME: cache}).logits, expected, **CLOSE)


def test_a_cache_whose_model_is_unknown_asks_for_the_model(model, tokens, tmp_path):
    cache = pickle.loads(pickle.dumps(model(tokens[:, :12], use_cache=True)[CACHE_NAME]))
    with pytest.raises(ValueError, match="Pass the native GMA model as `model=`"):
        gma_hf.save_cache(cache, tmp_path / "cache.safetensors")
    assert not any(tmp_path.iterdir())
    gma_hf.save_cache(cache, tmp_path / "cache.safetensors", model=model)
    loaded = gma_hf.load_cache(tmp_path / "cache.safetensors", model)
    logits = model(tokens[:, 12:], **{CACHE_NAME: loaded}).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, 12:], **CLOSE)


def test_a_failed_save_leaves_the_older_file(model, path, tokens):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cache is empty"):
        gma_hf.save_cache(DynamicCache(config=model.config), path)
    cache = model(tokens, use_cache=True)[CACHE_NAME]
    cache.layers[0].memory.state[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        gma_hf.save_cache(cache, path)
    assert path.read_bytes() == before and [other.name for other in path.parent.iterdir()] == [path.name]


@torch.no_grad()
def test_native_and_converted_models_do_not_read_each_others_caches(tokens, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    native = make_model(gma_hf.GMAForCausalLM, tiny_config("paper", **sizes, head_dim=8, routing_dim=8))
    converted = make_converted_model("llama")
    other = make_converted_model("llama", seed=1)
    # The states have the same shapes
    caches = [model(tokens[:, :12], use_cache=True)[CACHE_NAME] for model in (native, converted)]
    assert len({tuple(cache.layers[0].memory.state.shape) for cache in caches}) == 1
    for cache in (caches[0], pickle.loads(pickle.dumps(caches[0])), copy.deepcopy(caches[0])):
        with pytest.raises(
            ValueError, match="a native model filled it, and a converted model with LlamaAttention got it"
        ):
            converted(tokens[:, 12:], **{CACHE_NAME: cache})
    for cache in (caches[1], pickle.loads(pickle.dumps(caches[1])), copy.deepcopy(caches[1])):
        with pytest.raises(
            ValueError, match="a converted model with LlamaAttention filled it, and a native model got it"
        ):
            native(tokens[:, 12:], **{CACHE_NAME: cache})
    gma_hf.save_cache(caches[0], tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="a native model filled it"):
        converted(tokens[:, 12:], **{CACHE_NAME: gma_hf.load_cache(tmp_path / "cache.safetensors", native)})
    with pytest.raises(ValueError, match="The cache does not fit the model: other weights"):
        other(tokens[:, 12:], **{CACHE_NAME: copy.deepcopy(caches[1])})
    for filled in (pickle.loads(pickle.dumps(caches[1])), caches[1]):
        logits = copy.deepcopy(converted)(tokens[:, 12:], **{CACHE_NAME: filled}).logits
        torch.testing.assert_close(logits, converted(tokens).logits[:, 12:], **CLOSE)
