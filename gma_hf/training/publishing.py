# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""From a trained model's folder to one that can be published: what belongs there is copied, everything is checked.

The folder that a model was trained in is only read. Nothing goes along that this module does not know by name:
optimizer states, checkpoints, logs and files of other programs stay behind, and the user is told. Code of the folder is
never run and never passed on: the remote-code file is written anew.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from transformers import AutoConfig

from ..remote_code import REMOTE_CODE_MODULE
from .cards.model_card import is_gma
from .cards.published_card import check_metadata
from .errors import TrainingInputError


# What a published model consists of
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PUBLISHED = (
    *WEIGHTS,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # SentencePiece
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "results.json",
    "LICENSE",
)
CARD_FILES = ("README.md", "recipe.yaml", "results.json", "LICENSE", "*.png", "*.svg")
# What is left behind, and what to call it
LEFT_BEHIND = {
    "checkpoint-*": "a checkpoint of the training",
    "optimizer*": "an optimizer state",
    "scheduler.pt": "a state of the training",
    "scaler.pt": "a state of the training",
    "rng_state*": "a state of the training",
    "trainer_state.json": "a state of the training",
    "training_args.bin": "a pickle, which runs code when it is read",
    "*.bin": "a pickle, which runs code when it is read",
    "*.pt": "a pickle, which runs code when it is read",
    "*.pth": "a pickle, which runs code when it is read",
    "*.pkl": "a pickle, which runs code when it is read",
    "events.out.*": "a log",
    "runs": "logs",
}
# Files of a training that is to go on: their folder is no finished model
CHECKPOINT_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "pytorch_model_fsdp_0")
GB = 10**9
# The hub takes larger files, but advises against them; weights can be written in shards
MAX_FILE_BYTES = 50 * GB
# Texts that other people read: no folder of this machine may stand in them
READ_BY_PEOPLE = ("*.md", "*.yaml", "results.json", "*config.json")

LOADING_PROGRAM = """
import sys
if {imports_gma_hf}:
    import gma_hf
else:
    assert "gma_hf" not in sys.modules
import torch, transformers
remote = {{}} if {imports_gma_hf} else {{"trust_remote_code": True}}

def observe(folder):
    # `architectures` names the class; the Auto class that makes it is the one with its head
    head = transformers.AutoConfig.from_pretrained(folder, **remote).architectures[0]
    heads = [name[len("AutoModel"):] for name in dir(transformers) if name.startswith("AutoModelFor")]
    auto_class = getattr(transformers, "AutoModel" + max((name for name in heads if head.endswith(name)), key=len, default=""))
    model = auto_class.from_pretrained(folder, **remote).eval()
    if model.main_input_name != "input_ids":
        return model.state_dict()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        return {{"output": model(**inputs)[0]}}

torch.save([observe(folder) for folder in {folders}], {output!r})
"""


@dataclass
class Assembly:
    """A folder that is ready to be published.

    Attributes:
        folder: where it lies.
        files: names and sizes in bytes.
        left_behind: what of the source does not go along, and why.
    """

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    left_behind: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


def assemble(
    source: str | Path,
    target: str | Path,
    card: str | Path | None = None,
    max_total_gb: float = 100.0,
    metadata: dict[str, str] | None = None,
) -> Assembly:
    """Copy what belongs to a published model into an empty folder and check it.

    Args:
        source: folder of the trained model; only read.
        target: folder to fill; must be empty or missing, and not inside of `source`.
        card: folder with the model card, the recipe and the results; they replace those of `source`.
        max_total_gb: gigabytes that the folder may have at most.
        metadata: fields of the copied card's metadata to set, such as `license`; the source's card stays as it is.

    Returns:
        The folder with what is in it.

    Raises:
        TrainingInputError: if the source is no finished model in safetensors, a file is too large, there is no valid model
            card, or a text names a folder of this machine.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    _check_source(source)
    if source == target or source in target.parents:
        raise TrainingInputError(f"{target} lies in {source}, which stays as it is. Choose another output folder.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TrainingInputError(f"{target} is not empty. Choose another output folder, or empty it.")
    chosen, left_behind = _choose(source, PUBLISHED)
    if card is not None:
        card = Path(card).resolve()
        if not card.is_dir():
            raise TrainingInputError(f"There is no folder {card}; --card is a folder with README.md and recipe.yaml.")
        from_card, _ = _choose(card, CARD_FILES)
        chosen.update(from_card)
    if "README.md" not in chosen:
        raise TrainingInputError(
            f"Neither {source} nor --card has a README.md. gma-hf card writes one from measurements."
        )
    _check_sizes(chosen, max_total_gb)
    _check_names_no_code(chosen)

    was_there = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, path in chosen.items():
            shutil.copyfile(path, target / name)
        _write_remote_code(source, target, left_behind)
        model_card = read_card(target / "README.md")
        if metadata:
            for name, value in metadata.items():
                setattr(model_card.data, name, value)
            model_card.save(target / "README.md")
        check_metadata(model_card)
        _check_no_folders(target, source)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        if was_there:
            target.mkdir()
        raise
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    return Assembly(target, files, left_behind)


def keep(assembly: Assembly, folder: str | Path) -> Assembly:
    """Move an assembled folder to its final place. One that is there already and is the same to the bit is taken as it is.

    Args:
        assembly: the folder.
        folder: where it shall lie.

    Raises:
        TrainingInputError: if the place holds something else.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.is_dir() and any(folder.iterdir()):
        names = {path.name for path in folder.iterdir()}
        differing = sorted(names ^ set(assembly.files)) or [
            name for name in assembly.files if not filecmp.cmp(folder / name, assembly.folder / name, shallow=False)
        ]
        if differing:
            raise TrainingInputError(
                f"{folder} is not empty and differs from what would be published ({differing[0]}). Choose another output "
                "folder, or empty this one."
            )
        return Assembly(folder, assembly.files, assembly.left_behind)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        folder.rmdir()
    shutil.move(assembly.folder, folder)
    return Assembly(folder, assembly.files, assembly.left_behind)


def read_card(path: Path) -> ModelCard:
    """Read a model card as the hub does.

    Raises:
        TrainingInputError: if its metadata cannot be read.
    """
    try:
        return ModelCard.load(path)
    except Exception as error:  # YAML errors and a ValueError of huggingface_hub's own
        raise TrainingInputError(f"The metadata of {path.name} cannot be read: {error}") from error


def check_loading(source: str | Path, folder: str | Path) -> str:
    """Load source and assembled folder, each in a fresh process and the second also without gma_hf imported.

    Args:
        source: folder of the trained model.
        folder: the assembled folder.

    Returns:
        What was compared, as a sentence.

    Raises:
        TrainingInputError: if a folder does not load, or does not compute the same to the last bit.
    """
    source, folder = Path(source).resolve(), Path(folder).resolve()
    with tempfile.TemporaryDirectory() as work:
        expected, actual = _observe([source, folder], True, work)
        _expect_equal(expected, actual, "gma_hf imported", source)
        (actual,) = _observe([folder], False, work)
        _expect_equal(expected, actual, "trust_remote_code alone", source)
    what = "outputs" if "output" in expected else "weights"
    return f"loads in fresh processes, with gma_hf imported and with trust_remote_code alone; {what} equal bit for bit"


def publish(
    assembly: Assembly, repo_id: str, private: bool = False, revision: str | None = None, api: HfApi | None = None
) -> str:
    """Let the hub validate the card, create the repository if it is missing, and upload the folder.

    Args:
        assembly: the folder.
        repo_id: `user/name`.
        private: whether a new repository is private.
        revision: branch to upload to, created if missing; by default the main one.
        api: the hub; by default with the token of `hf auth login`.

    Returns:
        Address of the repository.

    Raises:
        TrainingInputError: if the hub refuses the card, or the upload breaks off.
    """
    check_repo_id(repo_id)
    api = api or HfApi()
    try:
        read_card(assembly.folder / "README.md").validate(repo_type="model")
    except ValueError as error:
        raise TrainingInputError(f"The hub refuses the model card: {error}") from error
    try:
        url = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=assembly.folder,
            revision=revision,
            commit_message="Model, card and recipe",
            allow_patterns=list(assembly.files),
        )
    except (HfHubHTTPError, OSError) as error:
        raise TrainingInputError(
            f"The upload to {repo_id} broke off: {error}. What is on the hub by then stays there; give the same command again."
        ) from error
    return str(url)


def check_repo_id(repo_id: str) -> None:
    """Check that a name is one of the hub, with its user or organisation in front.

    Raises:
        TrainingInputError: if it is not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TrainingInputError(f"--repo_id: {error}") from error
    if "/" not in repo_id:
        raise TrainingInputError(f"--repo_id must name a user or an organisation: 'user/{repo_id}', not {repo_id!r}.")


def _check_source(source: Path) -> None:
    if not source.is_dir():
        raise TrainingInputError(f"There is no folder {source}. Give the folder that save_pretrained wrote.")
    if not (source / "config.json").is_file():
        raise TrainingInputError(f"{source} has no config.json. Give the folder that save_pretrained wrote.")
    states = [name for name in CHECKPOINT_FILES if (source / name).exists()]
    if states:
        raise TrainingInputError(
            f"{source} is a checkpoint of a training that may go on (it has {states[0]}), not a finished model. Give the "
            "output folder of the training, or load the checkpoint and save_pretrained it elsewhere."
        )
    if not any(source.glob("*.safetensors")):
        raise TrainingInputError(
            f"{source} has no weights in safetensors. Load the model and save_pretrained it, which writes them."
        )
    _check_shards(source)


def _check_shards(source: Path) -> None:
    for index in source.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in shards if not (source / name).is_file())
        if missing:
            raise TrainingInputError(f"{index.name} names {missing[0]}, which is not in {source}.")


def _choose(folder: Path, patterns: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, str]]:
    """Files of a folder that match, and what else is there with the reason why it stays."""
    chosen, left_behind = {}, {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            if not path.resolve().is_relative_to(folder):
                raise TrainingInputError(
                    f"{path} is a link to {path.resolve()}, outside of the folder. Copy the file into the folder if it is to "
                    "be published."
                )
            chosen[path.name] = path
        else:
            reasons = (reason for pattern, reason in LEFT_BEHIND.items() if fnmatch(path.name, pattern))
            left_behind[path.name] = next(reasons, "a folder" if path.is_dir() else "not part of a published model")
    return chosen, left_behind


def _check_sizes(files: dict[str, Path], max_total_gb: float) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    for name, size in sizes.items():
        if size > MAX_FILE_BYTES:
            raise TrainingInputError(
                f"{name} has {size / GB:.1f} GB, more than the {MAX_FILE_BYTES / GB:g} GB of a file on the hub. Save the model "
                "again with max_shard_size='5GB'."
            )
    if sum(sizes.values()) > max_total_gb * GB:
        raise TrainingInputError(
            f"The files have {sum(sizes.values()) / GB:.2f} GB, more than --max_total_gb {max_total_gb:g}. Raise it if that is "
            "meant."
        )


def _check_names_no_code(chosen: dict[str, Path]) -> None:
    """Refuse configurations that make others run code which is not published, that of another repository above all."""
    for name, path in chosen.items():
        if not fnmatch(name, "*config.json"):
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainingInputError(f"{path} is no JSON: {error}.") from error
        if name == "config.json" and isinstance(values, dict):
            # Written anew, see `_write_remote_code`
            values.pop("auto_map", None)
        code = _named_code(values)
        if code is not None:
            raise TrainingInputError(
                f"{name} names code of its own ({code}), which is not published. Take the entry out; save a tokenizer or processor "
                "with a class of Transformers."
            )


def _named_code(values: Any) -> str | None:
    """The first entry of a configuration, however deep, by which Transformers would run code from a repository."""
    if isinstance(values, list):
        return next((code for code in map(_named_code, values) if code is not None), None)
    if not isinstance(values, dict):
        return None
    for key, value in values.items():
        is_code = key in ("auto_map", "custom_pipelines") and value
        # The name of a repository with compiled kernels
        is_code = is_code or (key.strip("_").startswith("attn_implementation") and "/" in json.dumps(value))
        if is_code:
            return f"{key}: {value}"
        inner = _named_code(value)
        if inner is not None:
            return inner
    return None


def _write_remote_code(source: Path, target: Path, left_behind: dict[str, str]) -> None:
    """Write the remote-code file of a GMA model, and point its configuration to nothing else."""
    config = AutoConfig.from_pretrained(target, trust_remote_code=False)
    name = f"{REMOTE_CODE_MODULE}.py"
    values = json.loads((target / "config.json").read_text(encoding="utf-8"))
    auto_map = None
    if is_gma(config):
        with tempfile.TemporaryDirectory() as work:
            config.save_pretrained(work)
            auto_map = config.auto_map
            shutil.copyfile(Path(work) / name, target / name)
    if values.get("auto_map") != auto_map:
        values.pop("auto_map", None)
        values |= {} if auto_map is None else {"auto_map": auto_map}
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    left_behind.pop(name, None)
    if (source / name).exists() and (
        not (target / name).exists() or not filecmp.cmp(source / name, target / name, shallow=False)
    ):
        left_behind[name] = "not what this version of gma_hf writes; it was not run, and is written anew"


def _check_no_folders(folder: Path, source: Path) -> None:
    names = {str(source), str(source.parent), str(Path.home()), tempfile.gettempdir()} - {os.sep}
    for path in sorted(folder.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in READ_BY_PEOPLE):
            continue
        text = path.read_text(encoding="utf-8")
        for name in sorted(names):
            if f"{name}{os.sep}" in text or f'"{name}"' in text:
                raise TrainingInputError(
                    f"{path.name} names {name}, a folder of this machine. Others cannot use it: edit the text."
                )


def _expect_equal(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], how: str, source: Path) -> None:
    differing = [name for name in expected if not torch.equal(expected[name], actual.get(name, torch.empty(0)))]
    if differing:
        raise TrainingInputError(
            f"With {how} the assembled folder does not compute what {source} does: {differing[0]} differs."
        )


def _observe(folders: list[Path], imports_gma_hf: bool, work: str) -> list[dict[str, torch.Tensor]]:
    """What a fresh process sees of models: outputs for fixed tokens, or the weights of those that read no tokens."""
    output = Path(work) / "observed.pt"
    source = LOADING_PROGRAM.format(
        imports_gma_hf=imports_gma_hf, folders=[str(folder) for folder in folders], output=str(output)
    )
    # A private home: remote code that another program cached is not run, and nothing is left behind
    environment = {**os.environ, "HF_HOME": str(Path(work) / "home"), "HF_HUB_OFFLINE": "1"}
    # gma_hf may be imported from a clone
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, cwd=work)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise TrainingInputError(f"{folders[-1]} does not load in a fresh process: {lines[-1]}")
    return torch.load(output, weights_only=True)
