# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The mixtures of a converted model route queries and keys as they were before rotary positions."""

import importlib
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from gma_hf import convert_to_gma, gma_layers
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.conversion.calibration.teacher import as_teacher
from gma_hf.ops.rotation.functional import Rotation, slow_columns, turns_halves
from tests.conversion.tiny_models import (
    FAMILIES,
    GQA,
    SIZES,
    make_converted_model,
    make_inputs,
    make_softmax_model,
    output_of,
    perturb,
)
from tests.ops.kernels import DEVICE


pytestmark = pytest.mark.quick
# Float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
# A rotation and its inverse: a handful of float32 roundings of vectors of order ten
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
# Conventions: halves, halves of the first dimensions (split by the function, or before it), cosines of half the dimensions
# with a factor, neighbours, neighbours of the first dimensions
MODELS = {
    "llama": ("LlamaForCausalLM", GQA, 8),
    "llama-yarn": ("LlamaForCausalLM", {**GQA, "rope_parameters": YARN}, 8),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES, 2),
    "stablelm": ("StableLmForCausalLM", GQA, 2),
    "gpt_oss": (*FAMILIES["gpt_oss"], 8),
    "cohere": ("CohereForCausalLM", GQA, 8),
    "glm": ("GlmForCausalLM", {**GQA, "head_dim": 8}, 4),
}


def make_model(class_name, arguments):
    """A tiny random model of Transformers, its weights large enough for attention to matter."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def watch_routed(model):
    """Queries and keys that the mixtures will route, a pair per call, in a list that is filled as the model runs."""
    seen = []
    for layer in gma_layers(model).values():
        layer.mixture_norm.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    return seen


def watch_projected(model):
    """Queries and keys `(batch, heads, length, dim)` as their projections give them, per layer, in a list."""
    seen = []

    def heads_first(output):
        return output.unflatten(-1, (-1, 8)).transpose(1, 2)

    for name in gma_layers(model):
        module = model.get_submodule(name)
        if hasattr(module, "query_key_value"):
            module.query_key_value.register_forward_hook(
                lambda module, args, output: seen.append(
                    output.unflatten(-1, (4, 24)).transpose(1, 2).chunk(3, -1)[:2]
                )
            )
        else:
            module.q_proj.register_forward_hook(lambda module, args, output: seen.append([heads_first(output)]))
            module.k_proj.register_forward_hook(lambda module, args, output: seen[-1].append(heads_first(output)))
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_what_is_routed_is_what_the_projections_gave(name):
    class_name, arguments, rotary_dim = MODELS[name]
    model = convert_to_gma(make_model(class_name, arguments), num_components=6, undo_rotation_beyond=0)
    assert [layer.rotary_dim for layer in gma_layers(model).values()] == [rotary_dim] * 2
    routed, projected = watch_routed(model), watch_projected(model)
    output_of(model, **make_inputs("llama"))
    assert len(routed) == len(projected) == 2
    for pair, expected in zip(routed, projected, strict=True):
        torch.testing.assert_close(tuple(pair), tuple(expected), **ROUNDED)


@pytest.mark.parametrize(
    ("name", "slow_dims"),
    [
        ("llama", [2, 3, 6, 7]),
        ("llama-yarn", [2, 3, 6, 7]),
        ("gpt_oss", [2, 3, 6, 7]),
        ("cohere", [4, 5, 6, 7]),
        ("glm", [2, 3]),
    ],
)
def test_slow_rotations_are_undone_and_fast_ones_stay(name, slow_dims):
    """A turn takes 6, 63, 628 and 6,283 tokens here (up to 8 times as many with YaRN)."""
    class_name, arguments, rotary_dim = MODELS[name]
    routed = {}
    for beyond in (0, 600, None):
        options = {"undo_rotation": False} if beyond is None else {"undo_rotation_beyond": beyond}
        model = convert_to_gma(make_model(class_name, arguments), num_components=6, **options)
        seen = watch_routed(model)
        output_of(model, **make_inputs("llama"))
        routed[beyond] = seen[0]
    fast_dims = [dim for dim in range(rotary_dim) if dim not in slow_dims]
    for undone, partly, rotated in zip(*routed.values(), strict=True):
        assert (undone[..., fast_dims] - rotated[..., fast_dims]).abs().max() > 0.1
        torch.testing.assert_close(partly[..., slow_dims], undone[..., slow_dims], **ROUNDED)
        torch.testing.assert_close(partly[..., fast_dims], rotated[..., fast_dims], **ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slow_rotations_are_found_in_every_layout(dtype):
    """Up to the rounding of cosines and sines; those that do not turn at all are slow."""
    speeds = torch.tensor([1.0, 0.1, 0.01, 0.001, 0.0])
    for columns, expected in (
        (speeds, [(2, 5)]),
        (speeds.repeat(2), [(2, 5), (7, 10)]),
        (speeds.repeat_interleave(2), [(4, 10)]),
        (speeds[:2], []),
    ):
        angles = torch.arange(5.0)[:, None] * columns
        cos, sin = ((1.3 * x).to(dtype)[None] for x in (angles.cos(), angles.sin()))
        assert slow_columns(cos, sin, 500) == expected
        assert slow_columns(cos[0], sin[0], 500) == expected
    assert slow_columns(cos, sin, 0) == slow_columns(cos[:, :1], sin[:, :1], 500) == [(0, 2)]


def test_fast_rotations_alone_leave_nothing_to_undo():
    fast = {**GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}
    options = {"num_components": 6, "window_size": 3}
    model = convert_to_gma(make_model("LlamaForCausalLM", fast), **options)
    assert [layer.rotary_dim for layer in gma_layers(model).values()] == [0, 0]
    with pytest.raises(ValueError, match="no rotation of the model takes more than"):
        convert_to_gma(make_model("LlamaForCausalLM", fast), **options, undo_rotation=True)
    with pytest.raises(ValueError, match="must not be negative"):
        convert_to_gma(make_model("LlamaForCausalLM", GQA), undo_rotation_beyond=-1)


def test_layers_without_a_window_undo_all_rotations_by_default():
    for window_size, columns in ((0, [(0, 8)]), (3, [(3, 4), (7, 8)])):
        layers = gma_layers(make_converted_model("llama", window_size=window_size)).values()
        assert [layer.undone_columns for layer in layers] == [columns] * 2


@pytest.mark.parametrize("window_size", [0, 4])
@pytest.mark.parametrize("undo_rotation", [True, False])
def test_the_memory_is_the_same_at_all_positions(window_size, undo_rotation):
    """If all rotations are undone; the window's softmax is so anyway, and so is then the balance of the two."""
    options = {"undo_rotation": undo_rotation, "undo_rotation_beyond": 0}
    model = make_converted_model("llama", window_size=window_size, **options)
    tokens = make_inputs("llama")["input_ids"]
    seen = []
    layer = next(iter(gma_layers(model).values()))
    layer.mixture_norm.register_forward_hook(lambda module, args, output: seen.append((args[1], output)))
    positions = torch.arange(tokens.shape[1])[None]
    near, far = (output_of(model, input_ids=tokens, position_ids=positions + shift) for shift in (0, 1000))
    (near_key, near_read), (far_key, far_read) = (
        (key, read if isinstance(read, torch.Tensor) else read[0]) for key, read in seen
    )
    if undo_rotation:
        torch.testing.assert_close(near_key, far_key, **ROUNDED)
        torch.testing.assert_close(near_read, far_read, **CLOSE)
        torch.testing.assert_close(near, far, **CLOSE)
    else:
        assert (near_key - far_key).abs().max() > 1.0
        assert (near_read - far_read).abs().max() > 0.1


def test_the_inverse_takes_factors_and_rounding_with_it():
    """Turned back are the first dimensions alone, whatever the length of (cos, sin)."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    angles = torch.rand(2, 5, 3, generator=generator) * 100
    cos, sin = (1.3 * torch.cat([x, x], dim=-1).bfloat16().float() for x in (angles.cos(), angles.sin()))
    rotate = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    turned = rotate(query[..., :6], key[..., :6], cos, sin)
    rotated = [torch.cat([x, y[..., 6:]], dim=-1) for x, y in zip(turned, (query, key), strict=True)]
    undone = Rotation(rotate, cos, sin).undo(*rotated, 6)
    torch.testing.assert_close(undone, (query, key), **ROUNDED)
    narrow = Rotation(rotate, cos, sin).undo(*(x.bfloat16() for x in rotated), 6)
    assert {x.dtype for x in narrow} == {torch.bfloat16}
    # Two roundings to 8 bits of numbers up to 4
    torch.testing.assert_close([x.float() for x in narrow], [query, key], rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("function", "width"), [("llama", 12), ("gpt_oss", 6)])
@pytest.mark.parametrize("undone", [0, 2])
def test_the_kernel_undoes_rotations_of_halves(undone, function, width, dtype, monkeypatch):
    """
    Of the first dimensions, all or but the first rotations, at positions of each row or of all; queries as projections leave
    them. With its gradient.
    """
    columns = [(first + undone, first + 6) for first in range(0, width, 6)]
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    rotate = importlib.import_module(f"transformers.models.{function}.modeling_{function}").apply_rotary_pos_emb
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    for batch in (1, 2):
        angles = random(batch, 35, 6).repeat(1, 1, width // 6)
        rotation = Rotation(rotate, 1.3 * angles.cos(), 1.3 * angles.sin())
        states = [random(2, 35, heads, 20).transpose(1, 2).to(dtype).requires_grad_() for heads in (3, 1)]
        grads = [random(*x.shape).to(dtype) for x in states]
        results = {}
        for backend in ("chunked", "triton"):
            monkeypatch.setenv("GMA_HF_BACKEND", backend)
            outputs = rotation.undo(*states, 12, columns)
            results[backend] = (*outputs, *torch.autograd.grad(outputs, states, grads))
        if undone > 0:
            assert all(torch.equal(x[..., :undone], y[..., :undone]) for x, y in zip(outputs, states, strict=True))
        rounded = ROUNDED if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
        torch.testing.assert_close(results["triton"], results["chunked"], **rounded)


@pytest.mark.parametrize(("function", "is_known"), [("llama", True), ("cohere", False), ("glm", False)])
def test_the_kernel_leaves_other_conventions_to_pytorch(function, is_known, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setenv("GMA_HF_BACKEND", "triton")
    rotate = importlib.import_module(f"transformers.models.{function}.modeling_{function}").apply_rotary_pos_emb
    assert turns_halves(rotate, 8, 8) == is_known
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(1, 5, 4, generator=generator).to(DEVICE)
    # Cohere's angles stand where the dimensions do that they turn
    angles = angles.repeat_interleave(2, dim=-1) if function == "cohere" else angles.repeat(1, 1, 2)
    query = torch.randn(1, 2, 5, 8, generator=generator).to(DEVICE)
    rotation = Rotation(rotate, angles.cos(), angles.sin())
    undone = rotation.undo(*rotate(query, query, rotation.cos, rotation.sin), 8)
    torch.testing.assert_close(undone, (query, query), **ROUNDED)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bert", "vit", "bart"])
def test_models_without_rotary_positions_are_untouched(model_type):
    inputs = make_inputs(model_type)
    outputs = []
    for options in ({}, {"undo_rotation": False}):
        torch.manual_seed(0)
        model = make_converted_model(model_type, window_size=3, **options)
        assert all(layer.rotary_dim == 0 for layer in gma_layers(model).values())
        outputs.append(output_of(model, **inputs))
    assert torch.equal(*outputs)
    softmax = make_softmax_model(model_type)
    expected = output_of(softmax, **inputs)
    with pytest.raises(ValueError, match="needs layers with rotary positions"):
        convert_to_gma(softmax, undo_rotation=True)
    assert torch.equal(output_of(softmax, **inputs), expected)


def test_layers_without_positions_beside_rotary_ones_are_untouched():
    layers = list(gma_layers(make_converted_model("smollm3")).values())
    assert [layer.rotary_dim for layer in layers] == [8, 0]


@pytest.mark.parametrize(
    ("class_name", "arguments"),
    [
        (
            "DeepseekV3ForCausalLM",
            {
                **SIZES,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 8,
                "first_k_dense_replace": 2,
            },
        ),
        ("HunYuanDenseV1ForCausalLM", {**GQA, "head_dim": 8}),
    ],
    ids=["the last dimensions", "a norm after the rotation"],
)
def test_what_cannot_be_undone_is_routed_as_it_is(class_name, arguments):
    model = convert_to_gma(make_model(class_name, arguments), num_components=6)
    assert [layer.rotary_dim for layer in gma_layers(model).values()] == [0, 0]
    assert output_of(model, **make_inputs("llama")).isfinite().all()


def test_looking_for_rotations_leaves_no_trace():
    """Neither hooks nor other outputs."""
    model, inputs = make_softmax_model("llama"), make_inputs("llama")
    expected = output_of(model, **inputs)
    with pytest.raises(ValueError, match="layers"):
        convert_to_gma(model, layers=["nothing.like.that"])
    assert torch.equal(output_of(model, **inputs), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bidirectional_layers_need_a_window_to_do_without_positions():
    """Or they would see no order at all, unless that is what is asked for."""
    for options, rotary_dim in (({}, 0), ({"window_size": 3}, 8), ({"undo_rotation": True}, 8)):
        layers = gma_layers(make_converted_model("modernbert", **options)).values()
        assert [layer.rotary_dim for layer in layers] == [rotary_dim] * 2
    tokens = make_inputs("modernbert")["input_ids"]
    orderless = make_converted_model("modernbert", undo_rotation=True, undo_rotation_beyond=0)
    turned = output_of(orderless, input_ids=tokens.flip(1))
    torch.testing.assert_close(turned.flip(1), output_of(orderless, input_ids=tokens), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"window_size": 3, "use_routing_projections": True}])
def test_a_checkpoint_keeps_what_it_routes(options, tmp_path):
    inputs = make_inputs("llama")
    for undo_rotation in (True, False):
        model = make_converted_model("llama", undo_rotation=undo_rotation, **options)
        model.save_pretrained(tmp_path / str(undo_rotation))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(undo_rotation))
        assert torch.equal(output_of(loaded, **inputs), output_of(model, **inputs))


@pytest.mark.parametrize("window_size", [0, 3])
def test_a_checkpoint_from_before_routes_rotated_vectors(window_size, tmp_path):
    model = make_converted_model("llama", window_size=window_size, undo_rotation_beyond=0)
    rotated = make_converted_model("llama", window_size=window_size, undo_rotation=False)
    inputs = make_inputs("llama")
    expected = output_of(rotated, **inputs)
    assert (output_of(model, **inputs) - expected).abs().max() > 1e-2
    rotated.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for shapes in config["gma"]["layers"].values():
        assert shapes.pop("rotary_dim") == 0
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert torch.equal(output_of(AutoModelForCausalLM.from_pretrained(tmp_path), **inputs), expected)


def test_a_checkpoint_from_before_there_was_a_choice_undoes_all_rotations(tmp_path):
    model, inputs = make_converted_model("llama", undo_rotation_beyond=0), make_inputs("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for shapes in config["gma"]["layers"].values():
        assert shapes.pop("undone_columns") == [[0, 8]]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert torch.equal(output_of(AutoModelForCausalLM.from_pretrained(tmp_path), **inputs), output_of(model, **inputs))


@pytest.mark.parametrize("options", [{}, {"use_routing_projections": True}])
def test_the_teacher_shows_what_the_student_routes(options):
    """What the mixtures are fitted to is what they get."""
    model, tokens = make_converted_model("llama", layers=[0], **options), make_inputs("llama")["input_ids"]
    routed, shown = watch_routed(model), []
    output_of(model, input_ids=tokens)
    with as_teacher(model, lambda call: shown.append(call.routed())):
        output_of(model, input_ids=tokens)
    assert len(shown) == 1
    assert all(torch.equal(x, y) for x, y in zip(shown[0], routed[0], strict=True))


@pytest.mark.parametrize("window_size", [0, 3])
def test_rotated_vectors_of_padded_rows_are_those_of_the_row_alone(window_size):
    """A mixture that does not undo the rotation is told how many real tokens precede a token."""
    model = make_converted_model("llama", window_size=window_size, undo_rotation=False)
    tokens = make_inputs("llama", batch_size=1)["input_ids"]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], dim=1)
    output = output_of(model, input_ids=padded, attention_mask=(padded != 0).long())[:, 5:]
    torch.testing.assert_close(output, output_of(model, input_ids=tokens), **CLOSE)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_oss", "cohere", "glm"])
@pytest.mark.parametrize("window_size", [0, 4])
def test_going_on_from_a_cache_is_one_pass(name, window_size):
    class_name, arguments, _ = MODELS[name]
    options = {"num_components": 6, "window_size": window_size}
    model = perturb(convert_to_gma(make_model(class_name, arguments), **options))
    tokens = make_inputs("llama")["input_ids"]
    expected = output_of(model, input_ids=tokens, use_cache=False)
    with torch.no_grad():
        first = model(tokens[:, :7], use_cache=True)
        parts = [first.logits]
        parts += [model(part, **{CACHE_NAME: first[CACHE_NAME]}).logits for part in tokens[:, 7:].split([1, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for is_checkpointed in (False, True):
        model = make_converted_model("llama", window_size=4).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**make_inputs("llama"), use_cache=False).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_missing_rotation_is_an_error():
    layer = next(iter(gma_layers(make_converted_model("llama")).values()))
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="called without `position_embeddings="):
        layer(query, key, key)
