"""What a model's name stands for: a local folder, a GGUF file, or a repository on the hub."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean_path
from paca.messages.program import program
from paca.messages.shown import shown

Source = Literal["hub", "folder", "gguf"]

# What `paca train`, TRL and transformers leave to tokenize with.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)

_KINDS_OF_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")


@dataclass(frozen=True)
class Location:
    """Where a model lies."""

    source: Source
    name_or_path: str
    """A hub id, or an absolute local path."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer that lies in `folder`; none if there is none."""
    return [folder / name for name in TOKENIZER_FILES if os.path.isfile(folder / name)]


def locate(name: str) -> Location:
    """Find out whether `name` is a local folder, a GGUF file or a hub id. What exists locally comes first.

    Raises:
        PacaError: `name` exists but is not a model, or neither exists nor could be a hub id.
    """
    if not name.strip():
        raise PacaError("The model name is empty. Give a hub id, a local folder or a .gguf file.")
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, `~` of nobody
        raise PacaError(f"There is no model {shown(name)}: {error}. Check the name.") from error
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise PacaError(
                f"The model {name!r} is a file of type {path.suffix or '(none)'!r}. Of single files, only .gguf can be "
                "read; for other checkpoints give the folder that holds config.json."
            )
        return Location("gguf", str(path.resolve()))
    if path.is_dir():
        if (path / "model" / "config.json").is_file() and not (path / "config.json").is_file():
            path = path / "model"  # of a run that trained the whole model
        _check_folder(path, name)
        return Location("folder", str(path.resolve()))
    if not is_path(name):
        from huggingface_hub.errors import HFValidationError  # here, for a misspelt path should not have to wait for it
        from huggingface_hub.utils import validate_repo_id

        with suppress(HFValidationError):
            validate_repo_id(name)
            return Location("hub", name)
    raise PacaError(f"{not_there(name)} Check the path.")


def is_path(name: str) -> bool:
    """Whether a name is a path by its form: the hub has no model of that name."""
    return name.startswith(("/", ".", "~")) or name.lower().endswith(".gguf")


def not_there(name: str) -> str:
    """The message for a model that is neither here nor can be on the hub."""
    form = "" if is_path(name) else ", and the name does not have the form of a hub id (owner/name)"
    return (
        f"No model at {name!r}: there is no such file or folder (working folder: {Path.cwd()}){form}."
        f"{neighbour_hint(name)}"
    )


def neighbour_hint(name: str) -> str:
    """`" Did you mean ...?"` for a path that is not there, where something of nearly that name is."""
    return did_you_mean_path(Path(name).expanduser(), _may_be_model)


def _may_be_model(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".gguf"


def _check_folder(path: Path, name: str) -> None:
    adapted = (path / "adapter_config.json").is_file()
    if (path / "config.json").is_file():
        if adapted:
            raise PacaError(
                f"The folder {name!r} holds a model and an adapter, which transformers would put on it unasked. Nobody "
                "has checked it. Move adapter_config.json and the adapter's weights to a folder of their own."
            )
        return
    if adapted or (path / "adapter" / "adapter_config.json").is_file():
        raise PacaError(
            f"The folder {name!r} holds an adapter, not a model. Give the model it was trained on "
            f"(base_model_name_or_path in its {'' if adapted else 'adapter/'}adapter_config.json). To train it on, "
            f"give it as model.adapter, or put it into a model, and give that: {program()} merge {shlex.quote(name)} "
            "--output FOLDER"
        )
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_files:
        raise PacaError(f"The folder {name!r} holds GGUF files; give one of them, not the folder: {gguf_files}.")
    models = sorted(str(Path(name, each.parent.name)) for each in path.glob("*/config.json"))
    hint = f" Did you mean {models[0]!r}?" if len(models) == 1 else f" It holds models: {models}." if models else ""
    raise PacaError(
        f"The folder {name!r} is not a model: it has no config.json.{hint} A model folder holds config.json, the "
        "weights (*.safetensors) and the tokenizer's files."
    )


def lacks_weights(name: str) -> bool:
    """Whether `name` is a folder without any file of weights, such as one with a config alone."""
    folder = Path(name).expanduser()
    return folder.is_dir() and not any(next(folder.glob(kind), None) for kind in _KINDS_OF_WEIGHTS)
