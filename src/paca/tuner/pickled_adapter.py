"""An adapter's weights as a pickle, which PEFT saves if asked, or no weights at all."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path

import psutil
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

_CALLED = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *("torch.storage UntypedStorage", "torch._utils _rebuild_tensor_v3"),
}
"""All that a pickle of tensors names, but for types: torch's own rule (`weights_only`) lets a few bytes ask for any
amount of memory, through `bytearray` and others."""


def shapes_in_pickle(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors in the pickle of a folder, by their names (errors as of `tensors_in_pickle`)."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(
            f"The adapter in {folder} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there. "
            "Copy the folder again, or save the adapter again. (To train a new adapter with its settings, set "
            "config.loading = False.)"
        )
    return {name: tensor.shape for name, tensor in tensors_in_pickle(path).items()}


def tensors_in_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of `torch.save`, by their names. Raise `ValueError`, naming the file, if it is damaged, or
    is not one of dense tensors alone, or these are larger than the file."""
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)  # the values too: they may be damaged
    except Exception as error:  # what zipfile, pickle and torch raise for damaged files is of all kinds
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} can't be read ({first_line}): the file is broken, or not one of tensors alone. Copy it again, "
            "or save the adapter again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; an adapter's file holds tensors by their names.")
    size = 0
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{path} holds {name!r}: {kind}. An adapter's file holds dense tensors by their names.")
        size += tensor.numel() * tensor.element_size()
    if size > 2 * path.stat().st_size:  # tied weights are there twice
        raise ValueError(f"{path} holds tensors that repeat their values, and would take {size:,} bytes.")
    return content


def _check_archive(path: Path) -> None:
    """Raise ValueError if reading the file would run something, or take more memory than its size."""
    free = psutil.virtual_memory().available
    if path.stat().st_size > free:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, and {free:,} are free in memory")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # zipfile looks at a file's end, torch at its beginning
            raise ValueError("it is no file of torch.save, or one of before PyTorch 1.6")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError("it is compressed, as torch.save never does")
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is no file of torch.save")
        data = archive.read(pickles[0])
    for code, argument, _ in pickletools.genops(data):  # torch refuses the codes that name things in other ways
        if code.name == "GLOBAL":
            _check_called(str(argument))


def _check_called(name: str) -> None:
    module, _, attribute = name.partition(" ")
    kinds = isinstance(getattr(torch, attribute, None), torch.dtype) or attribute.endswith("Storage")
    if name not in _CALLED and not (module == "torch" and kinds):
        raise pickle.UnpicklingError(f"it names {module}.{attribute}, which is no part of a tensor")
