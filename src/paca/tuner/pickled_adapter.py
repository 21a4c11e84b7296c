"""An adapter's weights as a pickle, which PEFT saves if asked, or no weights at all."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


def shapes_in_pickle(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors in the pickle of a folder, by their names.

    Raises:
        ValueError: If there is none, or it is damaged, or is not one of tensors alone; names it.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(
            f"The adapter in {folder} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there. "
            "Copy the folder again, or save the adapter again. (To train a new adapter with its settings, set "
            "config.loading = False.)"
        )
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
