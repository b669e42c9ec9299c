# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""What `scripts/publish_to_hub.py` promises: a folder that others can load, nothing else, and nothing without --upload."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

import gma_hf
from gma_hf.commands.publishing.assembly import assemble
from gma_hf.commands.publishing.hub import publish
from gma_hf.commands.publishing.loading import check_loading
from gma_hf.training import TrainingInputError, train_tokenizer
from gma_hf.training.cards.published_card import check_metadata
from tests.conftest import make_model, tiny_config


SCRIPT = Path(__file__).parents[1] / "scripts" / "publish_to_hub.py"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
tags: [gma]
model-index:
- name: toy
  results:
  - task: {type: text-generation}
    dataset: {type: local, name: toy}
    metrics:
    - {type: perplexity, value: 12.5}
---
# A toy
"""


@pytest.fixture
def trained(tmp_path):
    """The output folder of a training, with all that a training leaves lying about."""
    folder = tmp_path / "trained"
    tokenizer = train_tokenizer(["the river runs past old mills\n" * 20], 270)
    model = make_model(gma_hf.GMAForCausalLM, tiny_config("hybrid", vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "results.json").write_text('{"metrics": {}}')
    (folder / "checkpoint-5").mkdir()
    torch.save({}, folder / "checkpoint-5" / "optimizer.pt")
    torch.save({}, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def card(tmp_path):
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "README.md").write_text(CARD.replace("A toy", "The card of the folder"))
    (folder / "recipe.yaml").write_text("preset: gated\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class LocalHub(HfApi):
    """The hub as a folder of this machine."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.calls = folder, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        (self.folder / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])
        return f"https://huggingface.co/{repo_id}"

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **options):
        self.calls.append(("upload_folder", repo_id, options))
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.folder / repo_id / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that accepts every card."""
    monkeypatch.setattr(ModelCard, "validate", lambda self, repo_type: None)
    return LocalHub(tmp_path / "hub")


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["publish_to_hub.py", *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.quick
def test_what_a_training_leaves_behind_is_never_published(trained, card, tmp_path):
    before = contents(trained)
    assembly = assemble(trained, tmp_path / "out", card)
    assert set(assembly.files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "gma_remote.py",
        "model.safetensors",
        "recipe.yaml",
        "results.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(contents(tmp_path / "out")) == set(assembly.files)
    assert {"checkpoint-5", "training_args.bin", "trainer_state.json", "notes.txt"} <= set(assembly.left_behind)
    assert "The card of the folder" in (tmp_path / "out" / "README.md").read_text()
    assert contents(trained) == before


def test_the_assembled_folder_computes_the_same_in_fresh_processes(trained, tmp_path):
    assembly = assemble(trained, tmp_path / "out")
    assert "outputs equal bit for bit" in check_loading(trained, assembly.folder)
    assert set(contents(assembly.folder)) == set(assembly.files)  # no caches either


def test_a_converted_model_is_published_with_its_remote_code(trained, tmp_path):
    converted = tmp_path / "converted"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = gma_hf.convert_to_gma(LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)), num_components=4)
    model.save_pretrained(converted)
    (converted / "README.md").write_text(CARD)
    assembly = assemble(converted, tmp_path / "out")
    assert "gma_remote.py" in assembly.files
    assert "outputs equal bit for bit" in check_loading(converted, assembly.folder)


def test_remote_code_that_is_missing_is_written(trained, tmp_path):
    (trained / "gma_remote.py").unlink()
    config = json.loads((trained / "config.json").read_text())
    config.pop("auto_map")
    (trained / "config.json").write_text(json.dumps(config))
    before = contents(trained)
    assembly = assemble(trained, tmp_path / "out")
    assert "gma_remote.py" in assembly.files
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]["AutoConfig"] == "gma_remote.GMAConfig"
    )
    assert contents(trained) == before


def test_code_of_the_folder_is_neither_run_nor_passed_on(trained, tmp_path):
    mark = tmp_path / "has run"
    for name in ("gma_remote.py", "modeling_other.py"):
        with (trained / name).open("a") as file:
            file.write(f"\nimport pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    config = json.loads((trained / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "someone/else--modeling_other.Config", "AutoModel": "modeling_other.Model"}
    (trained / "config.json").write_text(json.dumps(config))
    assembly = assemble(trained, tmp_path / "out")
    check_loading(trained, assembly.folder)
    assert not mark.exists()
    assert [path.name for path in assembly.folder.glob("*.py")] == ["gma_remote.py"]
    assert "touch" not in (assembly.folder / "gma_remote.py").read_text()
    published = json.loads((assembly.folder / "config.json").read_text())["auto_map"]
    assert {value.split(".")[0] for value in published.values()} == {"gma_remote"}
    assert "not what this version of gma_hf writes" in assembly.left_behind["gma_remote.py"]
    assert "modeling_other.py" in assembly.left_behind


def test_a_tokenizer_with_code_of_its_own_is_refused(trained, tmp_path):
    config = json.loads((trained / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_other.Tokenizer", None]}
    (trained / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingInputError, match=r"tokenizer_config\.json names code of its own"):
        assemble(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("config.json", {"custom_pipelines": {"x": {"impl": "other/repository--pipeline.Pipeline"}}}),
        ("config.json", {"attn_implementation": "other/repository"}),
        ("config.json", {"_attn_implementation": {"text_config": "other/repository:function"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "other/repository--model.Model"}}}),
        ("generation_config.json", {"auto_map": {"AutoModel": "model.Model"}}),
    ],
)
def test_a_configuration_that_names_code_of_others_is_refused(trained, tmp_path, file, entry):
    path = trained / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(TrainingInputError, match=f"{file} names code of its own"):
        assemble(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "model.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused(trained, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes((trained / name).read_bytes() if (trained / name).exists() else b"private")
    (trained / name).unlink(missing_ok=True)
    (trained / name).symlink_to(secret)
    with pytest.raises(TrainingInputError, match=rf"{name} is a link to .*secret, outside of the folder"):
        assemble(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_publication_that_failed_can_be_tried_again(trained, tmp_path, hub, monkeypatch, capsys):
    """The same command, into the same folder: after a wrong licence, after a dry run, after an upload that broke off."""
    monkeypatch.setattr("gma_hf.commands.publish.check_loading", lambda *folders: "equal bit for bit")
    monkeypatch.setattr("gma_hf.commands.publishing.hub.HfApi", lambda: hub)
    words = [trained, "--repo_id", "user/toy", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match="no identifier"):
        run(monkeypatch, *words, "--license", "Apache 2")
    assert not (tmp_path / "out").exists()
    run(monkeypatch, *words)
    before = contents(tmp_path / "out")

    def break_off(**options):
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(hub, "upload_folder", break_off)
    with pytest.raises(SystemExit, match=r"broke off: the network is gone.*give the same command again"):
        run(monkeypatch, *words, "--upload")
    monkeypatch.undo()
    monkeypatch.setattr(ModelCard, "validate", lambda self, repo_type: None)
    monkeypatch.setattr("gma_hf.commands.publish.check_loading", lambda *folders: "equal bit for bit")
    monkeypatch.setattr("gma_hf.commands.publishing.hub.HfApi", lambda: hub)
    run(monkeypatch, *words, "--upload")
    assert contents(tmp_path / "out") == contents(hub.folder / "user" / "toy") == before
    with pytest.raises(SystemExit, match=r"not empty and differs from what would be published \(README\.md\)"):
        run(monkeypatch, *words, "--license", "mit")
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "out", "hub"}


def test_a_folder_that_computes_something_else_is_refused(trained, tmp_path):
    assembly = assemble(trained, tmp_path / "out")
    other = make_model(gma_hf.GMAForCausalLM, gma_hf.GMAConfig.from_pretrained(trained), seed=1)
    other.save_pretrained(assembly.folder)
    with pytest.raises(TrainingInputError, match="does not compute"):
        check_loading(trained, assembly.folder)


@pytest.mark.quick
def test_upload_creates_the_repository_and_sends_exactly_the_assembled_files(trained, card, tmp_path, hub):
    assembly = assemble(trained, tmp_path / "out", card)
    url = publish(assembly, "user/toy", private=True, revision="v1", api=hub)
    assert url == "https://huggingface.co/user/toy"
    assert contents(tmp_path / "hub" / "user" / "toy") == contents(assembly.folder)
    create, branch, upload = hub.calls
    assert create == ("create_repo", "user/toy", {"repo_type": "model", "private": True, "exist_ok": True})
    assert branch[2]["branch"] == upload[2]["revision"] == "v1"


def test_a_card_that_the_hub_refuses_is_not_uploaded(trained, tmp_path, hub, monkeypatch):
    def refuse(self, repo_type):
        raise ValueError("license must be one of")

    monkeypatch.setattr(ModelCard, "validate", refuse)
    with pytest.raises(TrainingInputError, match="license must be one of"):
        publish(assemble(trained, tmp_path / "out"), "user/toy", api=hub)
    assert hub.calls == []


def test_the_script_uploads_only_when_told_to(trained, card, hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi.__init__", lambda self: pytest.fail("a dry run asked for the hub"))
    # The processes of the real check are started in the tests above
    monkeypatch.setattr("gma_hf.commands.publish.check_loading", lambda *folders: "equal bit for bit")
    run(monkeypatch, trained, "--repo_id", "user/toy", "--card", card)
    shown = capsys.readouterr().out
    assert "Dry run" in shown and "model.safetensors" in shown and "stays behind: checkpoint-5" in shown
    assert "equal bit for bit" in shown and "1 results" in shown

    monkeypatch.setattr("gma_hf.commands.publishing.hub.HfApi", lambda: hub)
    run(monkeypatch, trained, "--repo_id", "user/toy", "--card", card, "--upload")
    assert "published: https://huggingface.co/user/toy" in capsys.readouterr().out
    assert "recipe.yaml" in contents(hub.folder / "user" / "toy")


@pytest.mark.quick
def test_errors_say_what_to_do(trained, card, tmp_path, monkeypatch):
    def refused(match, source=trained, target=tmp_path / "out", **options):
        with pytest.raises(TrainingInputError, match=match):
            assemble(source, target, **options)
        assert not (tmp_path / "out").exists()

    refused("no folder", source=tmp_path / "nowhere")
    refused("no config.json", source=tmp_path)
    refused("not empty", target=card)
    refused("must not change", target=trained / "inside")
    refused("no folder", card=tmp_path / "nowhere")
    refused("--max_total_gb", max_total_gb=1e-6)
    monkeypatch.setattr("gma_hf.commands.publishing.contents.MAX_FILE_BYTES", 1000)
    refused("max_shard_size")
    monkeypatch.undo()

    for repo_id, match in (("toy", "user/toy"), ("user/a b", "repo_id")):
        with pytest.raises(TrainingInputError, match=match):
            publish(None, repo_id)

    torch.save({}, trained / "optimizer.pt")
    refused("checkpoint")
    (trained / "optimizer.pt").unlink()
    (trained / "README.md").unlink()
    refused("gma-hf card")
    (trained / "model.safetensors").unlink()
    torch.save({}, trained / "pytorch_model.bin")
    refused("safetensors")


def test_a_missing_shard_is_found(trained, tmp_path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (trained / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TrainingInputError, match="model-00002-of-00002"):
        assemble(trained, tmp_path / "out")


def test_no_folder_of_this_machine_is_published(trained, card, tmp_path):
    (card / "recipe.yaml").write_text(f"train_file: {tmp_path}/trained/corpus.txt\n")
    with pytest.raises(TrainingInputError, match="folder of this machine"):
        assemble(trained, tmp_path / "out", card)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("license: apache-2.0\n", "", "license is missing"),
        ("apache-2.0", "Apache 2", "no identifier"),
        ("apache-2.0", "other", "license_name"),
        ("text-generation\n", "text-poetry\n", "pipeline_tag"),
        ("language: en", "language: English", "ISO 639"),
        ("tags: [gma]", "datasets: [not a data set]", "datasets"),
        ("value: 12.5", "value: twelve", "not a number"),
    ],
)
def test_metadata_that_the_hub_would_refuse(old, new, match):
    check_metadata(ModelCard(CARD))
    with pytest.raises(TrainingInputError, match=match):
        check_metadata(ModelCard(CARD.replace(old, new, 1)))


def test_what_a_trainings_own_card_lacks_can_be_given(trained, tmp_path):
    """A card that a training wrote knows neither licence nor language."""
    incomplete = CARD.replace("license: apache-2.0\n", "").replace("language: en\n", "")
    (trained / "README.md").write_text(incomplete)
    assembly = assemble(trained, tmp_path / "out", metadata={"license": "mit", "language": "en"})
    published = ModelCard.load(assembly.folder / "README.md")
    assert (published.data.license, published.data.language) == ("mit", "en") and "# A toy" in published.text
    assert (trained / "README.md").read_text() == incomplete


def test_a_card_whose_metadata_cannot_be_read(trained, tmp_path):
    (trained / "README.md").write_text(CARD.replace("metrics:", "measures:"))
    with pytest.raises(TrainingInputError, match="cannot be read"):
        assemble(trained, tmp_path / "out")
