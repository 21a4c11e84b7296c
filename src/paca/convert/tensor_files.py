"""The files of an adapter as conversions read and write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paca.tuner.adapter_checks import DELTA, INDICES
from paca.tuner.pickled_adapter import tensors_in_pickle

FILE_PREFIX = "base_model.model."
QUANTIZATION = "base_quantization"


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or in one of `torch.save`; PacaError if it is none."""
    try:
        if file.suffix != ".safetensors":
            return tensors_in_pickle(file)
        if not file.is_file():
            raise PacaError(f"{file} is no file: a folder, a pipe or a device.")
        return load_file(file)
    except PacaError:
        raise
    except ValueError as error:
        raise PacaError(str(error)) from error
    except Exception as error:  # what safetensors and torch raise for damaged files is of many kinds
        raise PacaError(f"{file} is broken: {error}. Copy the file again, or train again.") from error


def recorded_quantization(file: Path) -> str | None:
    """How the weights were quantized that an adapter was made for, if its safetensors file says so."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get(QUANTIZATION)


def column_tensors(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by their names there, for the `delta` and `indices` of each layer."""
    tensors = {f"{FILE_PREFIX}{name}.{DELTA}": layer.delta for name, layer in layers.items()}
    return tensors | {f"{FILE_PREFIX}{name}.{INDICES}": layer.indices for name, layer in layers.items()}


def write_adapter(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], quantization: str | None = None
) -> None:
    """Write an adapter's config and weights into `folder`, over files of the same names.

    `quantization` goes into the weights' metadata, where programs that do not know it pass over it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    recorded = {} if quantization is None else {QUANTIZATION: quantization}
    save_file(contiguous, folder / ADAPTER_WEIGHTS[0], {"format": "pt"} | recorded)
    # A set's order differs from process to process.
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
