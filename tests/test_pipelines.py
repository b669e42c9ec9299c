# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The pipelines of Transformers work on a folder with a model and its tokenizer."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import gma_hf
from tests.conftest import make_model, tiny_config


WORDS = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", "the", "cat", "sat", "on", "mat", "dog", "ran"]


@pytest.fixture
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def save(model_class, tokenizer, folder, **overrides):
    model = make_model(model_class, tiny_config("gated", vocab_size=len(WORDS), **overrides))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.quick
def test_text_generation(tokenizer, tmp_path):
    save(gma_hf.GMAForCausalLM, tokenizer, tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), batch_size=2)
    prompts = ["the cat", "the dog ran on"]
    # The shorter prompt is padded in the batch
    results = generator(prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_tensors=True)
    model = gma_hf.GMAForCausalLM.from_pretrained(tmp_path)
    for prompt, result in zip(prompts, results, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(5):  # the likeliest word after all before it, but not the end of the text
            logits = model(tokens, use_cache=False).logits[:, -1]
            logits[:, tokenizer.eos_token_id] = -torch.inf
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
        assert result[0]["generated_token_ids"][-5:] == tokens[0, -5:].tolist()


@pytest.mark.quick
def test_text_classification(tokenizer, tmp_path):
    save(gma_hf.GMAForSequenceClassification, tokenizer, tmp_path, id2label={0: "cats", 1: "dogs"})
    classifier = pipeline("text-classification", model=str(tmp_path))
    texts = ["the cat sat", "the dog ran on the mat"]
    alone = [classifier(text)[0] for text in texts]
    together = classifier(texts, batch_size=2)
    model = gma_hf.GMAForSequenceClassification.from_pretrained(tmp_path)
    for text, result in zip(texts, alone, strict=True):
        shares = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(dim=-1)
        assert result["label"] == ("cats", "dogs")[shares.argmax()]
        assert result["score"] == pytest.approx(shares.max().item(), rel=1e-5)
    assert [result["label"] for result in together] == [result["label"] for result in alone]
    # The batch is padded, which changes float32 rounding only
    assert [pytest.approx(result["score"], abs=1e-5) for result in alone] == [result["score"] for result in together]


@pytest.mark.quick
def test_fill_mask(tokenizer, tmp_path):
    save(gma_hf.GMAForMaskedLM, tokenizer, tmp_path, is_causal=False)
    text = "the <mask> sat on the mat"
    results = pipeline("fill-mask", model=str(tmp_path))(text)
    logits = gma_hf.GMAForMaskedLM.from_pretrained(tmp_path)(**tokenizer(text, return_tensors="pt")).logits
    expected = logits[0, 1].softmax(dim=-1).topk(5)
    assert [result["token_str"] for result in results] == [WORDS[index] for index in expected.indices]
    assert [result["score"] for result in results] == pytest.approx(expected.values.tolist(), rel=1e-5)


@pytest.mark.quick
def test_token_classification_and_question_answering(tokenizer, tmp_path):
    save(gma_hf.GMAForTokenClassification, tokenizer, tmp_path / "tokens", is_causal=False)
    found = pipeline("token-classification", model=str(tmp_path / "tokens"))("the cat sat")
    model = gma_hf.GMAForTokenClassification.from_pretrained(tmp_path / "tokens")
    shares = model(**tokenizer("the cat sat", return_tensors="pt")).logits[0].softmax(dim=-1)
    assert [part["word"] for part in found] == ["the", "cat", "sat"]
    assert [part["entity"] for part in found] == [f"LABEL_{index}" for index in shares.argmax(dim=-1)]
    assert [part["score"] for part in found] == pytest.approx(shares.amax(dim=-1).tolist(), rel=1e-5)

    save(gma_hf.GMAForQuestionAnswering, tokenizer, tmp_path / "answers", is_causal=False)
    model = gma_hf.GMAForQuestionAnswering.from_pretrained(tmp_path / "answers")
    inputs = tokenizer("the cat sat", "on the mat", return_tensors="pt")
    outputs = model(**inputs, output_hidden_states=True)
    # Two numbers a token, read from the last hidden state
    expected = model.qa_outputs(outputs.hidden_states[-1])
    torch.testing.assert_close(torch.stack([outputs.start_logits, outputs.end_logits], dim=-1), expected)
    assert expected.shape == (1, 6, 2)


def test_the_trained_model_of_the_repository_continues_a_text():
    generator = pipeline(
        "text-generation", model=str(Path(__file__).resolve().parent.parent / "pretrained" / "gma-wikipedia-7m")
    )
    (result,) = generator("The city is", max_new_tokens=12, do_sample=False)
    assert result["generated_text"].startswith("The city is") and len(result["generated_text"].split()) > 6
