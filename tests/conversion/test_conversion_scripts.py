# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The conversion scripts, run as a user runs them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import gma_hf  # noqa: F401 (registers the converted models)
from gma_hf.conversion import gma_layers
from gma_hf.training.text.tokenization import train_tokenizer
from tests.conversion.tiny_models import make_softmax_model
from tests.training.conftest import SCRIPTS, WORDS, command_line, corpus, private_cache, run_script, sentences  # noqa: F401


def save_source(folder, model_type="llama"):
    tokenizer = train_tokenizer(iter([" ".join(WORDS) + "."] * 20), vocab_size=300)
    if model_type == "bert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    else:
        special = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        model = make_softmax_model(
            model_type, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **special
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def conversion(corpus, tmp_path):  # noqa: F811
    """Arguments of a tiny conversion."""
    return {
        "train_file": str(corpus),
        "output_dir": str(tmp_path / "out"),
        "num_components": 8,
        "window_size": 4,
        "num_sink_tokens": 1,
        "calibration_tokens": 500,
        "calibration_batch_size": 4,
        "block_size": 32,
        "validation_fraction": 0.3,
        "disable_tqdm": True,
    }


@pytest.fixture
def distillation(conversion):
    """Arguments of a tiny distillation."""
    return {
        **conversion,
        "transfer_steps": 3,
        "distillation_steps": 4,
        "sample_tokens": 5,
        "prompts": "the river",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "gma_learning_rate": 1e-2,
        "max_eval_samples": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }


def continuation(folder, tokenizer_folder):
    """Five greedy tokens after the prompt of the recipe."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(tokenizer_folder)
    inputs = tokenizer("the river", return_tensors="pt", return_token_type_ids=False)
    prompt = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert prompt < tokens.shape[1] <= prompt + 5
    # The likeliest tokens, computed anew without a cache
    expected = model(tokens[:, :-1], use_cache=False).logits[:, prompt - 1 :].argmax(dim=-1)
    assert torch.equal(tokens[:, prompt:], expected)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def test_a_model_is_converted_saved_and_described(run_script, conversion, tmp_path):  # noqa: F811
    source = save_source(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    run_script("convert_attention", source, *command_line(conversion, device="cpu", keep_every=2))
    out = tmp_path / "out"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    model = AutoModelForCausalLM.from_pretrained(out)
    assert list(gma_layers(model)) == ["model.layers.0.self_attn"]
    assert AutoTokenizer.from_pretrained(out).decode([5]) == AutoTokenizer.from_pretrained(source).decode([5])
    written = results(out)
    calibration = written["conversion"]["calibration"]["layers"]["model.layers.0.self_attn"]
    assert calibration["error_after"] < calibration["error_before"]
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "source" and "gaussian-mixture-attention" in card.data.tags
    assert "import gma_hf" in card.text and str(tmp_path) not in card.content + json.dumps(written)


def test_the_most_sensitive_layers_can_be_kept(run_script, conversion, tmp_path):  # noqa: F811
    source = save_source(tmp_path / "source")
    arguments = {**conversion, "layers": "auto", "keep": 1, "ranking_tokens": 200}
    run_script("convert_attention", source, *command_line(arguments, device="cpu"))
    report = results(tmp_path / "out")["conversion"]
    assert report["converted_layers"] == [layer["name"] for layer in report["ranking"][1:]]


def test_a_model_is_distilled_evaluated_and_described(run_script, distillation, tmp_path, capsys):  # noqa: F811
    source, out = save_source(tmp_path / "source"), tmp_path / "out"
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({**distillation, "finetune_steps": 2, "lora_rank": 2}))
    run_script("distill", run_file, source)
    written = results(out)
    assert list(written["evaluations"]) == [
        "original, softmax",
        "after initialisation",
        "after attention transfer",
        "after distillation",
        "after fine-tuning",
    ]
    scores = written["evaluations"]
    assert scores["original, softmax"]["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert scores["after attention transfer"]["eval_kl"] < scores["after initialisation"]["eval_kl"]
    assert "after fine-tuning" in written["samples"]
    # The texts are what the models write: the original, and the one that the folder holds
    assert written["samples"]["original, softmax"] == [continuation(source, out)]
    assert written["samples"]["after fine-tuning"] == [continuation(out, out)]
    assert "| after distillation |" in capsys.readouterr().out
    assert "| after distillation |" in ModelCard.load(out / "README.md").text
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "GMALlamaForCausalLM"

    # The same command once more trains nothing, and ends with the same model
    run_script("distill", run_file, source)
    again = results(out)
    assert again["stages"] == written["stages"]
    assert again["samples"] == written["samples"]


def test_an_encoder_is_distilled_by_its_embeddings(run_script, distillation, tmp_path):  # noqa: F811
    source = save_source(tmp_path / "source", "bert")
    # An encoder has no sink tokens
    options = {
        "task": "feature-extraction",
        "num_sink_tokens": 0,
        "logits_weight": 0.0,
        "hidden_weight": 1.0,
        "embedding_weight": 1.0,
    }
    run_script("distill", source, *command_line({**distillation, **options}, text_documents="line"))
    scores = results(tmp_path / "out")["evaluations"]
    assert scores["original, softmax"]["eval_embedding_cosine"] == pytest.approx(1.0)
    # A random model hardly uses its attention: any softmax in a layer's place gives nearly the same embeddings. Seven steps
    # that learn something else lose more
    assert 0.999 < scores["after distillation"]["eval_embedding_cosine"] < 1


def test_two_processes_learn_what_one_does(run_script, distillation, tmp_path):  # noqa: F811
    source = save_source(tmp_path / "source")
    one, two = ({**distillation, "output_dir": tmp_path / name, "sample_tokens": 0} for name in ("one", "two"))
    run_script("distill", source, *command_line(one))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)}
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(SCRIPTS / "configs" / "ddp_cpu.yaml")]
    arguments = command_line(two, per_device_train_batch_size=2, per_device_eval_batch_size=4)
    command = [*launch, "--main_process_port", "0", str(SCRIPTS / "distill.py"), str(source), *arguments]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "two")["num_processes"] == 2
    scores, expected = (results(tmp_path / name)["evaluations"] for name in ("two", "one"))
    for state in ("original, softmax", "after initialisation"):
        assert scores[state]["eval_perplexity"] == pytest.approx(expected[state]["eval_perplexity"], rel=1e-4)
    for state in ("after attention transfer", "after distillation"):
        # The error of an attention is a ratio: that of four blocks is not the mean of two and two
        assert scores[state]["eval_kl"] == pytest.approx(expected[state]["eval_kl"], rel=0.3)
    # The weights moved in the same direction: gradients are those of all four blocks, not of a process's own two
    initial, moved, expected_move = (
        torch.cat([x.flatten() for x in AutoModelForCausalLM.from_pretrained(tmp_path / name).parameters()]).detach()
        for name in ("one/0-initialised", "two/1-attention_transfer", "one/1-attention_transfer")
    )
    assert torch.cosine_similarity(moved - initial, expected_move - initial, dim=0) > 0.9


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": "source"}, "would overwrite"),
        ({"keep": 1}, "go together"),
        ({"layers": "9"}, "has 2 self-attention layers"),
        ({"window_size": 40}, "nothing ever leaves the window"),
        (
            {"model_name_or_path": "no/such_model"},
            "Cannot load 'no/such_model': There is no folder 'no/such_model' here",
        ),
        (
            {"model_name_or_path": "./models/llama"},
            "Cannot load './models/llama': There is no folder './models/llama'. Give",
        ),
        ({"model_name_or_path": "/a/b/c"}, "Cannot load '/a/b/c': There is no folder '/a/b/c'. Give the folder"),
        ({"model_name_or_path": __file__}, "is a file. Give the folder that `save_pretrained` wrote"),
        ({"tokenizer_name": "./tokenizers/x"}, "Cannot load './tokenizers/x': There is no folder"),
        ({"learning_rat": 1}, "There is no argument --learning_rat"),
    ],
)
def test_bad_input_ends_the_script_with_one_message(run_script, conversion, tmp_path, changes, message):  # noqa: F811
    source = save_source(tmp_path / "source")
    if "output_dir" in changes:
        changes = {"output_dir": tmp_path / changes["output_dir"]}
    with pytest.raises(SystemExit, match=message):
        arguments = {"model_name_or_path": source, **conversion, "device": "cpu", **changes}
        run_script("convert_attention", *command_line(arguments))


def test_the_tokenizer_of_another_model_is_refused(run_script, conversion, tmp_path):  # noqa: F811
    source, other = save_source(tmp_path / "source"), save_source(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    arguments = {**conversion, "device": "cpu", "tokenizer_name": other}
    with pytest.raises(SystemExit, match=r"differs from that of .*the same number means different tokens"):
        run_script("convert_attention", source, *command_line(arguments))
    run_script("convert_attention", source, *command_line({**arguments, "tokenizer_name": source}))
