# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Promises that native and converted models make alike."""

import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from gma_hf.cache_argument import CACHE_NAME


def left_padded_prompts_generate_as_alone(model, tokens, **length):
    """`tokens` `(2, 19)`; `length` are the arguments of `generate` that say how long its texts are."""
    short = tokens[0, :7]
    batch = torch.zeros(2, 19, dtype=torch.long)
    batch[0, 12:], batch[1] = short, tokens[1]
    for implementation in (None, "static"):
        together = model.generate(
            batch,
            attention_mask=(batch != 0).long(),
            do_sample=False,
            cache_implementation=implementation,
            **length,
        )[:, 19:]
        alone = [model.generate(row[None], do_sample=False, **length)[0, len(row) :] for row in (short, tokens[1])]
        assert torch.equal(together, torch.stack(alone))


def compiled_decoding_never_recompiles(model, tokens, num_steps, vocab_size, **tolerance):
    """`tokens` `(2, 19)`, then `num_steps` further ones, one at a time."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    counter = CompileCounter()
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    steps = torch.randint(3, vocab_size, (2, num_steps), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model(tokens, **{CACHE_NAME: cache})
        logits = []
        for position in range(num_steps):
            arguments = model.prepare_inputs_for_generation(
                steps[:, position : position + 1],
                **{CACHE_NAME: cache},
                position_ids=torch.full((2, 1), 19 + position),
            )
            logits.append(step(**arguments).logits)
            if position == 0:
                compilations = counter.frame_count
        expected = model(torch.cat([tokens, steps], dim=1), use_cache=False).logits[:, 19:]
    assert counter.frame_count == compilations
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **tolerance)
