# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What lm-evaluation-harness and sentence-transformers compute in padded batches is what the model computes for each text."""

import pytest
import torch
from transformers import AutoTokenizer

import gma_hf
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import make_softmax_model


SENTENCES = ["import os", "def read_lines(path):\n    return path\n", "import json, math"]


def test_likelihoods_of_the_harness_are_those_of_the_model(demo_model, tokenizer):
    models = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm_eval")
    instance = pytest.importorskip("lm_eval.api.instance")
    harness = models.HFLM(pretrained="outputs/demo_train", backend="causal", device="cpu", batch_size=3)
    # The space before a word belongs to the word's token
    requests = [("import", " os"), ("def", " read_lines(path):\n"), ("import json, math", ", sys\n")]
    found = harness.loglikelihood(
        [instance.Instance("loglikelihood", {}, arguments, index) for index, arguments in enumerate(requests)]
    )
    for (context, continuation), (likelihood, is_greedy) in zip(requests, found, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            scores = demo_model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        expected = scores.gather(1, ids[0, start:, None]).sum()
        assert likelihood == pytest.approx(expected.item(), abs=1e-4)
        assert is_greedy == bool((scores.argmax(-1) == ids[0, start:]).all())


def encoder(kind: str, vocab_size: int):
    if kind == "native":
        return make_model(gma_hf.GMAModel, tiny_config("gated", vocab_size=vocab_size, is_causal=False))
    model = make_softmax_model("bert", vocab_size=vocab_size).bert
    return gma_hf.convert_to_gma(model, num_components=6, window_size=4 if kind == "converted with a window" else 0)


@pytest.mark.parametrize("kind", ["native", "converted", "converted with a window"])
def test_an_embedding_is_the_mean_over_the_tokens_of_the_text_whatever_stands_beside_it(kind, tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    model = encoder(kind, len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sentences = library.SentenceTransformer(str(tmp_path), device="cpu")
    found = sentences.encode(SENTENCES, batch_size=3, convert_to_tensor=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for embedding, text in zip(found, SENTENCES, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        # float32, and a mean over at most 20 tokens
        torch.testing.assert_close(embedding, alone[0].mean(0), rtol=1e-4, atol=1e-5)
