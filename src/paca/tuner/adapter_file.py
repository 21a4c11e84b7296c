"""Checks an adapter's file before PEFT touches the model: it reads the file only after it has put the adapter in."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

# PEFT adds both names to modules_to_save for these tasks, whichever of them the model has.
HEADS = frozenset({"classifier", "score"})
TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS")


def check_has_weights(folder: Path) -> None:
    """Check that a local adapter's folder holds weights, and not the config alone.

    Args:
        folder: Of the adapter. A hub id (no such folder) is left to PEFT.

    Raises:
        ValueError: If it has none; names the folder and the files that were expected.
    """
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(
            f"The adapter in {folder} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there. "
            "Copy the folder again, or save the adapter again. (To train a new adapter with its settings, set "
            "config.loading = False.)"
        )


def tensor_names(path: Path) -> list[str]:
    """The names in an adapter's safetensors file; none for a file of another kind.

    Raises:
        SafetensorError: If it can't be read.
    """
    if path.suffix != ".safetensors":
        return []
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def check_adapter_file(
    folder: Path, modules_to_save: Iterable[str] | None, task_type: str | None
) -> dict[str, torch.Size] | None:
    """Check that a local adapter's file can be read and holds the modules that were saved whole.

    Args:
        folder: Of the adapter. A hub id, or a folder without such a file, is left to PEFT.
        modules_to_save: Of the adapter's config.
        task_type: Of the adapter's config.

    Returns:
        The shapes of its tensors by their names; None if there is no file.

    Raises:
        ValueError: If the file is damaged or is none of tensors, or lacks a module; names the file.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        path = folder / WEIGHTS_NAME
        if not path.is_file():
            return None
        shapes = _shapes_in_pickle(path)
    else:
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} can't be read ({error}): the file is broken. Copy it again, or train again."
            ) from error
    for module in modules_to_save or ():
        either = HEADS if module in HEADS and task_type in TASKS_WITH_HEADS else {module}
        if not any(f".{one}." in f".{name}" for one in either for name in shapes):
            raise ValueError(f"{path} holds no tensor of {module}, which the adapter's modules_to_save promises.")
    return shapes


def _shapes_in_pickle(path: Path) -> dict[str, torch.Size]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # the values too: they may be damaged
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} can't be read ({first_line}): the file is broken, or not one of tensors alone. Copy it again, "
            "or save the adapter again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; an adapter's file holds tensors by their names.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{path} holds {name!r}: {kind}. An adapter's file holds dense tensors by their names.")
    return {name: tensor.shape for name, tensor in content.items()}
