"""A finished run, an adapter or a model, put on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import ADAPTER_CONFIG, adapter_settings, find_adapter, text_setting
from paca.tuner.adapter_entries import check_link

CARD = "README.md"
LOGIN = "Log in with `hf auth login`, or set the environment variable HF_TOKEN to a token that may write."


class Uploaded(NamedTuple):
    """What is on the hub now."""

    url: str
    files: list[str]
    bytes: int
    local_base: str | None
    """The base model that the adapter names, where that is a path of this machine, which nobody else can load."""


def check_login(repo: str) -> None:
    """Look whether something can be put on the hub, before hours are spent on making it.

    Args:
        repo: `owner/name`; a name alone is one of the user's own.

    Raises:
        PacaError: It is no name of a repository, nobody is logged in, or the hub does not answer or know the token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PacaError(f"{repo!r} is no name of a repository on the hub: {error} Give OWNER/NAME.") from error
    if get_token() is None:
        raise PacaError(f"Nobody is logged in to the hub, so that nothing can be put there. {LOGIN}")
    with _explained(repo):
        HfApi().whoami()


def upload(path: str | Path, repo: str, *, public: bool = False, base_model: str | None = None) -> Uploaded:
    """Put a run's adapter or model, or any folder with one, on the hub. The repository is made if need be.

    Args:
        path: The folder of a run, an adapter or a model.
        repo: As for `check_login`.
        public: Make a new repository public. One that exists stays as it is.
        base_model: What the adapter's config and card shall name as its base model; the folder here stays as it is.

    Raises:
        PacaError: There is nothing to put there, a file of it is a link to elsewhere, or the hub refuses it.
    """
    folder, is_adapter = _folder_of(path)
    base = text_setting(folder, "base_model_name_or_path") if is_adapter else None
    if base_model is not None and not is_adapter:
        raise PacaError(f"{folder} is a whole model; --base-model goes with an adapter. Leave it out.")
    check_login(repo)
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if _is_meant(file, folder))
    contents: dict[str, bytes | Path] = {name: folder / name for name in names}
    if base_model is not None:
        contents |= {name: text.encode() for name, text in _naming(base_model, folder, base).items()}
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    with _explained(repo):
        api = HfApi()
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.create_commit(made.repo_id, operations, commit_message=f"Upload {Path(path).resolve().name}")
    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in contents.values())
    named = base_model or base
    local = named if named is not None and os.path.isabs(named) else None
    return Uploaded(str(made), names, size, local)


def _folder_of(path: str | Path) -> tuple[Path, bool]:
    """The folder that is meant, and whether it holds an adapter."""
    adapter, given = find_adapter(path), Path(path).expanduser()
    if not given.is_dir():
        raise PacaError(f"{given} is a file. Give the folder of a run, an adapter or a model.")
    folder = adapter or (given / "model" if (given / "model" / "config.json").is_file() else given)
    _check_own(folder, given)
    return folder, adapter is not None


def _is_meant(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    meant = file.is_file() and not hidden and file.name != "training_args.bin"  # a pickle
    if meant:
        _check_own(file, folder)
    return meant


def _check_own(entry: Path, folder: Path) -> None:
    try:
        check_link(entry, folder)  # whoever made the folder may want a file of this user's on the hub
    except ValueError as error:
        raise PacaError(str(error)) from error


def _naming(base_model: str, folder: Path, old: str | None) -> dict[str, str]:
    """The adapter's config and card, with another base model."""
    settings = {**adapter_settings(folder), "base_model_name_or_path": base_model}
    if base_model != old:
        settings.pop("revision", None)  # of the old one
    texts = {ADAPTER_CONFIG: json.dumps(settings, indent=2, sort_keys=True) + "\n"}
    card = folder / CARD
    if card.is_file():
        try:
            text = card.read_text(encoding="utf-8")
            if old:
                text = text.replace(old, base_model)
            begin, head, rest = text.split("---\n", 2) if text.startswith("---\n") else ("", "", text)
            data: dict[str, Any] = {**(yaml.safe_load(head) or {}), "base_model": base_model}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise PacaError(
                f"{card} is no card that can name another base model: {reason}. Mend or delete it."
            ) from error
        texts[CARD] = f"{begin}---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{rest}"
    return texts


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What the hub or its client says becomes one message, which never holds the token."""
    token = get_token()
    try:
        yield
    except Exception as error:  # of huggingface_hub, and of whichever HTTP library it is made with
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = " ".join(str(error).split()) or type(error).__name__
        reason = text.replace(token, "[token]") if token else text
        advice = f" {LOGIN}" if status == 401 else " Is the token allowed to write there?" if status == 403 else ""
        raise PacaError(f"{repo} can't be put on the hub: {reason}{advice}") from None  # whose text may hold the token
