"""Checks an adapter's file before PEFT touches the model: it reads the file only after it has put the adapter in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

# PEFT adds both to the modules_to_save of every classifier, which has one of them.
_HEADS = {"classifier", "score"}


def check_has_weights(folder: Path) -> None:
    """Check that a local adapter's folder holds weights, and not the config alone.

    Args:
        folder: of the adapter. A hub id (no such folder) is left to PEFT.

    Raises:
        ValueError: if it has none; names the folder and the files that were expected.
    """
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(
            f"The adapter in {folder} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there. "
            "Copy the folder again, or save the adapter again. (To train a new adapter with its settings, set "
            "config.loading = False.)"
        )


def check_adapter_file(folder: Path, modules_to_save: Iterable[str] | None) -> None:
    """Check that a local adapter's safetensors file can be read and holds the modules that were saved whole.

    Args:
        folder: of the adapter. A hub id, or a folder without such a file, is left to PEFT.
        modules_to_save: of the adapter's config.

    Raises:
        ValueError: if the file is cut short or is no safetensors file, or lacks a module; names the file.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} can't be read ({error}): the file is broken. Copy it again, or train again."
        ) from error
    promised = set(modules_to_save or ())
    absent = {module for module in promised if not any(f".{module}." in f".{name}" for name in names)}
    if promised & _HEADS - absent:
        absent -= _HEADS
    if absent:
        raise ValueError(f"{path} holds no tensor of {min(absent)}, which the adapter's modules_to_save promises.")
