"""Reads what an adapter's file holds before PEFT touches the model: PEFT itself reads it only after that."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from paca.tuner.adapter_entries import check_entries
from paca.tuner.pickled_adapter import shapes_in_pickle

_READER = getattr(inspect.unwrap(vars(PeftModel)["from_pretrained"]), "__code__", None)  # others may wrap it


def folder_being_read() -> Path | None:
    """What `PeftModel.from_pretrained` reads just now, if it is at work: with `config=` nothing else says so."""
    frame = sys._getframe().f_back
    while frame is not None and frame.f_code is not _READER:
        frame = frame.f_back
    return None if frame is None else Path(frame.f_locals["model_id"], frame.f_locals["kwargs"].get("subfolder") or "")


def shapes_in(folder: Path, most: int = 100_000) -> dict[str, torch.Size] | None:
    """The shapes of the tensors in a local adapter's file, by their names; None for a hub id, which is left to PEFT.
    Raise `ValueError`, naming the file, if there is none, or it is damaged, is none of tensors, or has over `most`."""
    if not folder.is_dir():
        return None
    if any(entry.is_symlink() or not entry.is_file() for entry in folder.iterdir()):
        check_entries(folder)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return shapes_in_pickle(folder)
    try:
        with path.open("rb"), safe_open(path, framework="pt") as file:
            if len(names := file.keys()) > most:
                raise ValueError(f"there are {len(names):,} tensors, more than this model could take")
            return {name: file.get_tensor(name).shape for name in names}  # as PEFT will: mapped, not read
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} can't be read ({error}): the file is broken. Copy it again.") from error
