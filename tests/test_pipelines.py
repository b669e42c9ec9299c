# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The pipelines of Transformers work on a folder with a model and its tokenizer."""

import pytest
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
    results = generator(prompts, max_new_tokens=5, do_sample=False)
    assert [
        result[0]["generated_text"].startswith(prompt) for result, prompt in zip(results, prompts, strict=True)
    ] == [True, True]


@pytest.mark.quick
def test_text_classification(tokenizer, tmp_path):
    save(gma_hf.GMAForSequenceClassification, tokenizer, tmp_path, id2label={0: "cats", 1: "dogs"})
    classifier = pipeline("text-classification", model=str(tmp_path))
    texts = ["the cat sat", "the dog ran on the mat"]
    alone = [classifier(text)[0] for text in texts]
    together = classifier(texts, batch_size=2)
    assert {result["label"] for result in together} <= {"cats", "dogs"}
    # The batch is padded, which changes float32 rounding only
    assert [pytest.approx(result["score"], abs=1e-5) for result in alone] == [result["score"] for result in together]


@pytest.mark.quick
def test_fill_mask(tokenizer, tmp_path):
    save(gma_hf.GMAForMaskedLM, tokenizer, tmp_path, is_causal=False)
    results = pipeline("fill-mask", model=str(tmp_path))("the <mask> sat on the mat")
    assert len(results) == 5 and all(result["token_str"] in WORDS for result in results)


@pytest.mark.quick
def test_token_classification_and_question_answering(tokenizer, tmp_path):
    save(gma_hf.GMAForTokenClassification, tokenizer, tmp_path / "tokens", is_causal=False)
    assert len(pipeline("token-classification", model=str(tmp_path / "tokens"))("the cat sat")) == 3
    save(gma_hf.GMAForQuestionAnswering, tokenizer, tmp_path / "answers", is_causal=False)
    model = gma_hf.GMAForQuestionAnswering.from_pretrained(tmp_path / "answers")
    outputs = model(**tokenizer("the cat sat", "on the mat", return_tensors="pt"))
    assert outputs.start_logits.shape == outputs.end_logits.shape == (1, 6)
