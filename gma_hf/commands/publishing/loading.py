# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Check that an assembled folder computes the same as the trained model: both are loaded in fresh processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ...training.errors import TrainingInputError


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


def check_loading(source: str | Path, folder: str | Path) -> str:
    """
    Load the source and the assembled folder, each in a fresh process. The folder is also loaded without importing gma_hf.

    Args:
        source (`str` or `Path`): folder of the trained model.
        folder (`str` or `Path`): the assembled folder.

    Returns:
        `str`: one sentence about the comparison.

    Raises:
        TrainingInputError: if a folder does not load, or does not compute the same bits.
    """
    source, folder = Path(source).resolve(), Path(folder).resolve()
    with tempfile.TemporaryDirectory() as work:
        expected, actual = _observe([source, folder], True, work)
        _expect_equal(expected, actual, "gma_hf imported", source)
        (actual,) = _observe([folder], False, work)
        _expect_equal(expected, actual, "trust_remote_code alone", source)
    what = "outputs" if "output" in expected else "weights"
    return f"loads in fresh processes, with gma_hf imported and with trust_remote_code alone; {what} equal bit for bit"


def _expect_equal(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], how: str, source: Path) -> None:
    differing = [name for name in expected if not torch.equal(expected[name], actual.get(name, torch.empty(0)))]
    if differing:
        raise TrainingInputError(
            f"With {how} the assembled folder does not compute what {source} does: {differing[0]} differs."
        )


def _observe(folders: list[Path], imports_gma_hf: bool, work: str) -> list[dict[str, torch.Tensor]]:
    """The results of a fresh process for models: outputs for fixed tokens, or the weights of models that read no tokens."""
    output = Path(work) / "observed.pt"
    source = LOADING_PROGRAM.format(
        imports_gma_hf=imports_gma_hf, folders=[str(folder) for folder in folders], output=str(output)
    )
    # A temporary home folder, so that no cached remote code of another program runs, and no file is left
    environment = {**os.environ, "HF_HOME": str(Path(work) / "home"), "HF_HUB_OFFLINE": "1"}
    # gma_hf may be imported from a clone
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, cwd=work)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise TrainingInputError(f"{folders[-1]} does not load in a fresh process: {lines[-1]}")
    return torch.load(output, weights_only=True)
