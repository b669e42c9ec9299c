# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The scripts, run as a user runs them."""

import json
import math
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    pipeline,
)

from gma_hf.training import find_last_checkpoint

from .conftest import TINY_CONFIG, command_line, logged, results


def classification(run, train, output_dir, **changes):
    values = {**run, "train_file": str(train), "output_dir": str(output_dir), "max_length": 80, **changes}
    values.pop("block_size")
    return command_line(values)


def test_a_language_model_is_trained_saved_and_described(run_script, tiny_run, tmp_path, corpus):
    out = tiny_run["output_dir"]
    (tmp_path / "test.txt").write_text("the river runs past old mills.\n" * 20)
    run_script(
        "train_clm",
        *command_line(tiny_run, test_file=tmp_path / "test.txt", max_steps=30, save_steps=15, learning_rate=1e-2),
    )
    # Nats: it begins with a uniform guess among 300 tokens, and ends below the best guess of a model that knows how often each
    # token occurs and nothing else: so it reads what stands before
    assert logged(out)[0] == pytest.approx(math.log(300), abs=0.1)
    assert sum(logged(out)[-5:]) / 5 < unigram_entropy(out, corpus) - 0.3

    scores = results(out)["metrics"]
    for split in ("eval", "test"):
        assert scores[f"{split}_perplexity"] == pytest.approx(math.exp(scores[f"{split}_loss"]))
    test_text = (tmp_path / "test.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    # Every token of the file and the end of the document
    assert scores["test_num_tokens"] == len(tokenizer(test_text)["input_ids"]) + 1
    test_nll = scores["test_loss"] * scores["test_num_tokens"]
    assert scores["test_word_perplexity"] == pytest.approx(math.exp(test_nll / len(test_text.split())))
    assert scores["test_bits_per_byte"] == pytest.approx(test_nll / math.log(2) / len(test_text.encode()))
    assert 1 <= scores["eval_mixture/usage_perplexity_min"] <= scores["eval_mixture/usage_perplexity"] <= 4

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.use_decay and model.config.hidden_size == 32  # the gated preset, overridden
    assert model.config.use_cache  # although training goes without a cache
    assert model.config.eos_token_id == tokenizer.eos_token_id
    # Greedy continuation: each token is the likeliest after all before it, computed anew without a cache
    tokens = tokenizer("the river", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    for _ in range(3):
        logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    generated = writer("the river", max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert generated[0]["generated_text"] == tokenizer.decode(tokens[0]) != "the river"


def unigram_entropy(tokenizer, corpus):
    """Nats a token of a text, for a model that knows how often each token occurs and nothing else."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(tokenizer)(corpus.read_text())["input_ids"])
    shares = ids.bincount().double() / len(ids)
    return torch.special.entr(shares).sum().item()


def test_the_card_is_valid_and_tells_no_machine_paths(run_script, tiny_run, tmp_path):
    out = tiny_run["output_dir"]
    run_script("train_clm", *command_line(tiny_run))
    card = ModelCard.load(f"{out}/README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert "gaussian-mixture-attention" in card.data.tags
    scores = results(out)["metrics"]
    by_type = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert by_type["perplexity"] == scores["eval_perplexity"]
    assert by_type["bits_per_byte"] == scores["eval_bits_per_byte"]
    assert "corpus.txt" in card.content and "python scripts/train_clm.py --train_file=corpus.txt" in card.content
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    written = results(out)
    assert {"torch", "transformers", "gma_hf"} <= set(written["versions"])
    assert written["hyperparameters"]["learning_rate"] == 1e-3
    assert written["details"]["steps"] == 4
    for text in (card.content, json.dumps(written)):
        assert str(tmp_path) not in text


def test_a_yaml_file_trains_the_same_model_as_the_command_line(run_script, tiny_run, tmp_path):
    run_script("train_clm", *command_line(tiny_run))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tiny_run, "output_dir": str(tmp_path / "from_yaml")}))
    run_script("train_clm", tmp_path / "run.yaml")
    assert logged(tmp_path / "from_yaml") == logged(tiny_run["output_dir"])


def test_a_run_resumed_from_a_named_checkpoint_has_the_same_loss_curve(run_script, tiny_run, tmp_path):
    # Dropout makes the curve depend on the random state, too
    run = {**tiny_run, "config_overrides": TINY_CONFIG + ",hidden_dropout=0.1", "mixture_learning_rate": 1e-2}
    run.update(max_steps=6, save_steps=3, eval_strategy="steps", eval_steps=3)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_script("train_clm", *command_line(run, output_dir=whole))
    for checkpoint in (whole / "checkpoint-3", resumed / "checkpoint-3"):
        if not checkpoint.exists():
            shutil.rmtree(resumed)
            shutil.copytree(whole / "checkpoint-3", checkpoint)  # alone: it does not say of which run it is
        run_script("train_clm", *command_line(run, output_dir=resumed, resume_from_checkpoint=checkpoint))
        assert logged(resumed) == logged(whole)
        assert logged(resumed, "eval_loss")[-1] == logged(whole, "eval_loss")[-1]
        first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, resumed))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_trained_model_is_overwritten_only_when_asked(run_script, tiny_run, tmp_path):
    run_script("train_clm", *command_line(tiny_run, save_strategy="no"))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    changed = {**tiny_run, "save_strategy": "no", "seed": 1}
    with pytest.raises(SystemExit, match=r"--seed was 42, and is 1.*--overwrite_output_dir"):
        run_script("train_clm", *command_line(changed))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    run_script("train_clm", *command_line(changed, overwrite_output_dir=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_a_new_run_cannot_mistake_an_old_checkpoint_for_its_own(run_script, tiny_run, tmp_path):
    run_script("train_clm", *command_line(tiny_run))
    run_script("train_clm", *command_line(tiny_run, overwrite_output_dir=True, max_steps=2))
    assert find_last_checkpoint(tiny_run["output_dir"]).endswith("checkpoint-2")


def test_a_checkpoint_is_continued_with_its_tokenizer(run_script, tiny_run, tmp_path):
    run_script("train_clm", *command_line(tiny_run, learning_rate=1e-2))
    before = results(tiny_run["output_dir"])["metrics"]["eval_loss"]
    run = {name: value for name, value in tiny_run.items() if name not in ("config_overrides", "tokenizer_vocab_size")}
    out = tmp_path / "continued"
    run_script("train_clm", *command_line(run, model_name_or_path=tiny_run["output_dir"], output_dir=out))
    # It goes on from the trained weights: the first step has the loss at which the first training ended, not log 300
    assert logged(out)[0] < before + 0.2 < math.log(300) - 0.2
    assert results(out)["metrics"]["eval_loss"] < before
    assert results(out)["base_model"] == "out"
    assert (
        AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(run["output_dir"]).get_vocab()
    )


def test_other_architectures_and_the_paper_block_train_too(run_script, tiny_run, tmp_path):
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "llama"
    )
    out = tmp_path / "llama_out"
    run_script(
        "train_clm",
        *command_line(tiny_run, config_name=tmp_path / "llama", config_overrides="hidden_act=gelu", output_dir=out),
    )
    config = AutoConfig.from_pretrained(out)
    assert (config.model_type, config.hidden_act, config.vocab_size) == ("llama", "gelu", 300)
    assert "import gma_hf" not in (out / "README.md").read_text()
    run_script(
        "train_clm", *command_line(tiny_run, preset="paper", isolate_documents=True, text_documents="paragraph")
    )
    assert AutoConfig.from_pretrained(tiny_run["output_dir"]).position_embedding_type == "learned"


def test_mixed_precision_compilation_and_gradient_checkpointing_are_flags(run_script, tiny_run):
    run = {**tiny_run, "bf16": True, "gradient_checkpointing": True, "torch_compile": True, "max_steps": 2}
    # The eager backend traces without calling a compiler, which would take minutes
    run_script("train_clm", *command_line(run, torch_compile_backend="eager", eval_strategy="steps", eval_steps=1))
    assert all(math.isfinite(loss) for loss in logged(tiny_run["output_dir"]))


def test_a_masked_language_model_is_trained(run_script, tiny_run):
    out = tiny_run["output_dir"]
    run_script("train_mlm", *command_line(tiny_run, max_steps=20, save_steps=20, learning_rate=1e-2))
    assert logged(out)[0] == pytest.approx(math.log(300), abs=0.15)
    assert results(out)["metrics"]["eval_loss"] < math.log(300) - 1  # nats, on text and masks that it never saw
    config = AutoConfig.from_pretrained(out)
    assert not config.is_causal and not config.use_decay
    # What the pipeline fills in are the likeliest tokens at the mask
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForMaskedLM.from_pretrained(out)
    tokens = tokenizer("the <|mask|> runs", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    (at,) = (tokens[0] == tokenizer.mask_token_id).nonzero()[0].tolist()
    expected = model(tokens).logits[0, at].softmax(dim=-1).topk(2)
    filled = pipeline("fill-mask", model=model, tokenizer=tokenizer)("the <|mask|> runs", top_k=2)
    assert [answer["token"] for answer in filled] == expected.indices.tolist()
    assert [answer["score"] for answer in filled] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert ModelCard.load(f"{out}/README.md").data.pipeline_tag == "fill-mask"


def test_a_classifier_is_trained_from_scratch(run_script, tiny_run, labelled, tmp_path):
    out = tmp_path / "out"
    changes = {"test_file": labelled("test", seed=1), "validation_file": labelled("validation", seed=2)}
    changes.update(max_steps=150, save_steps=150, learning_rate=5e-3, per_device_train_batch_size=8)
    run_script("train_classification", *classification(tiny_run, labelled("train", 80), out, **changes))
    scores = results(out)["metrics"]
    # The first and the last word tell the class
    assert scores["test_accuracy"] == scores["test_f1_macro"] == scores["test_f1_binary"] == 1.0
    assert AutoConfig.from_pretrained(out).id2label == {0: "rural", 1: "urban"}
    classify = pipeline("text-classification", model=str(out))
    assert [answer["label"] for answer in classify(["rural old mills. rural", "urban old mills. urban"])] == [
        "rural",
        "urban",
    ]
    card = ModelCard.load(out / "README.md")
    assert {"accuracy", "f1"} <= {result.metric_type for result in card.data.eval_results}


def test_a_causal_checkpoint_is_fine_tuned_to_classify(run_script, tiny_run, labelled, tmp_path):
    run_script("train_clm", *command_line(tiny_run))
    run = {name: value for name, value in tiny_run.items() if name not in ("config_overrides", "tokenizer_vocab_size")}
    out = tmp_path / "classifier"
    changes = {
        "model_name_or_path": tiny_run["output_dir"],
        "max_steps": 150,
        "save_steps": 150,
        "learning_rate": 5e-3,
    }
    changes.update(per_device_train_batch_size=8)
    run_script("train_classification", *classification(run, labelled("train", 80), out, **changes))
    scores = results(out)["metrics"]
    assert scores["eval_accuracy"] == 1.0
    config = AutoConfig.from_pretrained(out)
    assert config.is_causal and config.architectures == ["GMAForSequenceClassification"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": "nowhere.txt"}, "error: No data file matches"),
        ({"block_size": 100_000}, "fewer than one block of 100000"),
        (
            {"preset": "paper", "block_size": 65},
            r"--block_size is 65, but .* 64 tokens only.*max_position_embeddings=65",
        ),
        ({"config_overrides": "num_heads=3"}, "GMAConfig has no field 'num_heads'"),
        ({"config_overrides": "hidden_size=33,num_attention_heads=2"}, "`hidden_size`.*not a multiple"),
        ({"config_overrides": "vocab_size=10"}, "vocab_size is 10, but the tokenizer has 300"),
        ({"model_name_or_path": "no/such_model"}, "no/such_model"),
        ({"resume_from_checkpoint": "no/checkpoint-1"}, "not a complete checkpoint"),
        ({"resume_from_checkpoint": True}, "no checkpoint to resume from"),
        ({"learning_rat": 1}, "Did you mean --learning_rate"),
    ],
)
def test_bad_input_ends_a_script_with_one_message(run_script, tiny_run, changes, message):
    with pytest.raises(SystemExit, match=message):
        run_script("train_clm", *command_line(tiny_run, **changes))


def test_a_text_to_classify_must_fit_learned_positions(run_script, tiny_run, labelled, tmp_path):
    arguments = classification(tiny_run, labelled("train"), tmp_path / "out", preset="paper", max_length=65)
    with pytest.raises(SystemExit, match=r"--max_length is 65, but .* 64 tokens only"):
        run_script("train_classification", *arguments)
