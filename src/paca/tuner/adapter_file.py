"""Reads what an adapter's file holds before PEFT touches the model: PEFT itself reads it only after that."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from paca.tuner.pickled_adapter import shapes_in_pickle


def shapes_in(folder: Path) -> dict[str, torch.Size] | None:
    """The shapes of the tensors in a local adapter's file, by their names; None for a hub id, which is left to PEFT.

    Raises:
        ValueError: If there is no file, or it is damaged, or is none of tensors; names it.
    """
    if not folder.is_dir():
        return None
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return shapes_in_pickle(folder)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} can't be read ({error}): the file is broken. Copy it again, or train again."
        ) from error
