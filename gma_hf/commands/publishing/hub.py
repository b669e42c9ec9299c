# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The Hub: names of repositories, model cards as the Hub reads them, and the upload."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from ...training.errors import TrainingInputError


if TYPE_CHECKING:
    from .assembly import Assembly


def read_card(path: Path) -> ModelCard:
    """
    Read a model card as the Hub does.

    Raises:
        TrainingInputError: if its metadata cannot be read.
    """
    try:
        return ModelCard.load(path)
    except Exception as error:  # YAML errors and a ValueError of huggingface_hub's own
        raise TrainingInputError(f"The metadata of {path.name} cannot be read: {error}") from error


def publish(
    assembly: "Assembly", repo_id: str, private: bool = False, revision: str | None = None, api: HfApi | None = None
) -> str:
    """
    Let the Hub validate the card, create the repository if it does not exist, and upload the folder.

    Args:
        assembly ([`Assembly`]): the folder.
        repo_id (`str`): `user/name`.
        private (`bool`): whether a new repository is private.
        revision (`str`, *optional*): branch for the upload, created if it does not exist; by default the main branch.
        api (`HfApi`, *optional*): the Hub; by default with the token of `hf auth login`.

    Returns:
        `str`: address of the repository.

    Raises:
        TrainingInputError: if the Hub refuses the card, or the upload fails.
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
            f"The upload to {repo_id} broke off: {error}. Uploaded files stay on the Hub; give the same command again."
        ) from error
    return str(url)


def check_repo_id(repo_id: str) -> None:
    """
    Check that a name is a name of the Hub, with its user or organisation.

    Raises:
        TrainingInputError: if it is not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TrainingInputError(f"--repo_id: {error}") from error
    if "/" not in repo_id:
        raise TrainingInputError(f"--repo_id must name a user or an organisation: 'user/{repo_id}', not {repo_id!r}.")
