# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The models compile without graph breaks, decode without recompilation, and export."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import gma_hf
from gma_hf.cache_argument import CACHE_NAME
from gma_hf.modeling import GMACacheLayer
from tests.conftest import TINY, make_model, tiny_config
from tests.promises import compiled_decoding_never_recompiles


TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_forward_and_backward_compile_in_one_graph(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block)).train()
    expected = model(tokens, labels=tokens, use_cache=False)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(tokens, labels=tokens, use_cache=False)
    torch.testing.assert_close(outputs.logits, expected.logits, **TOLERANCE)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale + 1e-6, name


def test_gradient_checkpointing_compiles_in_one_graph(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block)).train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale + 1e-6, name


def test_a_second_length_is_the_last_to_compile(block):
    """The first graph is for one length, the second for all."""
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (17, 33, 50, 90, 128, 20):
        batch = torch.randint(3, TINY["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            logits = compiled(batch, use_cache=False).logits
            torch.testing.assert_close(logits, model(batch, use_cache=False).logits, **TOLERANCE)
    assert counter.frame_count <= 2


def test_padded_batches_compile_in_one_graph(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(tokens, attention_mask=mask, use_cache=False).logits
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], **TOLERANCE)


def test_compiled_decoding_never_recompiles(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    compiled_decoding_never_recompiles(model, tokens, num_steps=10, vocab_size=TINY["vocab_size"], **TOLERANCE)


def test_export_with_any_length(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    exported = torch.export.export(
        model,
        (),
        {"input_ids": tokens, "use_cache": False},
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=128)}, "use_cache": None},
        strict=False,
    )
    longer = torch.cat([tokens, tokens, tokens], dim=1)
    torch.testing.assert_close(
        exported.module()(input_ids=longer, use_cache=False).logits, model(longer, use_cache=False).logits, **TOLERANCE
    )


def test_an_encoder_exports_with_any_batch_length_and_padding(block, tokens):
    model = make_model(gma_hf.GMAForMaskedLM, tiny_config(block, is_causal=False))
    shape = {0: torch.export.Dim("batch", min=2, max=9), 1: torch.export.Dim("length", min=2, max=128)}
    exported = torch.export.export(
        model,
        (),
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        strict=False,
    )
    batch = tokens.repeat(2, 3)[:, :45]
    mask = torch.ones_like(batch)
    mask[1, 30:] = mask[2, :7] = 0
    logits = exported.module()(input_ids=batch, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask == 1], model(batch, attention_mask=mask).logits[mask == 1], **TOLERANCE)


class DecodingStep(torch.nn.Module):
    """One token in, logits out; the state stays inside, in the buffers of the exported program."""

    def __init__(self, model, prompt):
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            model(prompt, **{CACHE_NAME: self.cache})
        for index, layer in enumerate(self.cache.layers):
            tensors = {"count": layer.cumulative_length}
            if isinstance(layer, GMACacheLayer):
                tensors.update(layer.memory._asdict())
                tensors["tokens_in_memory"] = tensors.pop("count")
                tensors["count"] = layer.cumulative_length
            else:
                tensors.update(keys=layer.keys, values=layer.values)
            for name, tensor in tensors.items():
                if tensor is not None:
                    self.register_buffer(f"{name}_{index}", tensor)

    def forward(self, input_ids, position_ids):
        return self.model(input_ids, position_ids=position_ids, **{CACHE_NAME: self.cache}).logits


def test_a_decoding_step_exports_with_its_state(block, tokens):
    model = make_model(gma_hf.GMAForCausalLM, tiny_config(block))
    steps = torch.randint(3, TINY["vocab_size"], (2, 5), generator=torch.Generator().manual_seed(4))
    expected = model(torch.cat([tokens, steps], dim=1), use_cache=False).logits[:, 19:]
    example = (steps[:, :1], torch.full((2, 1), 19))
    with torch.no_grad():
        program = torch.export.export(DecodingStep(model, tokens), example, strict=True).module()
        logits = [program(steps[:, i : i + 1], torch.full((2, 1), 19 + i)) for i in range(5)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)
