# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`save_pretrained` writes whole files or none, and says so where it cannot write."""

import contextlib
import json

import pytest

import gma_hf
from tests.conftest import make_model, tiny_config
from tests.conversion.tiny_models import make_converted_model


MODELS = {
    "native": lambda: make_model(gma_hf.GMAForCausalLM, tiny_config("gated")),
    "converted": lambda: make_converted_model("llama"),
}
BY_GMA = ("config.json", "gma_remote.py")


@pytest.fixture(params=list(MODELS))
def any_model(request):
    return MODELS[request.param]()


@contextlib.contextmanager
def files_up_to(limit: int):
    """As on a disk that is nearly full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [10, 900])
def test_a_full_disk_leaves_whole_files(any_model, tmp_path, limit):
    any_model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in BY_GMA}
    any_model.config.num_labels = 7  # so that the new file differs
    with pytest.raises(OSError), files_up_to(limit):
        any_model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in BY_GMA} == before
    assert not list(tmp_path.glob("*.unfinished"))
    any_model.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["id2label"]) == 7


def test_a_file_is_no_folder(any_model, tmp_path):
    """Transformers would log it, and save nothing."""
    file = tmp_path / "model"
    file.write_text("mine")
    for part in (any_model, any_model.config):
        with pytest.raises(ValueError, match="is a file"):
            part.save_pretrained(file)
    assert file.read_text() == "mine"


def test_a_link_to_nothing_is_no_folder(any_model, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing", target_is_directory=True)
    with pytest.raises(ValueError, match=r"link is a link to .*nothing, which does not exist"):
        any_model.save_pretrained(tmp_path / "link")
    (tmp_path / "nothing").mkdir()
    any_model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "nothing" / "model.safetensors").is_file()


def test_a_damaged_configuration_in_the_way_is_named(tmp_path):
    model = MODELS["converted"]()
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "lla'
