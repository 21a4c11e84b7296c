"""A PaCA adapter as the LoRA adapter that it is.

``W0 x + s delta x[indices]`` is ``W0 x + B A x`` with a matrix ``A`` that picks the inputs ``indices`` (one 1 in each
row) and ``B = s delta``. So LoRA of rank r says the same, and whatever runs LoRA runs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca.convert.adapter import FILE_PREFIX, AdaptedLayer, Adapter, adapter_in_model, read_adapter, tokenizer_files
from paca.convert.beforehand import adapter_in, lora_output
from paca.convert.output import new_folder
from paca.convert.patterns import default_and_pattern, exact_targets
from paca.messages.errors import PacaError
from paca.tuner.adapter_folder import ADAPTER_CONFIG

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


class Factors(NamedTuple):
    """One layer of LoRA, whose scale is 1."""

    a: Tensor  # (r, in_features) float32, one 1 in each row
    b: Tensor  # (out_features, r) float32


@dataclass
class LoraExport:
    """What was written."""

    output: Path
    base: str
    layers: int
    ranks: list[int]
    """Those that occur, ascending."""
    saved_whole: list[str]
    """Names of the tensors that were carried over as they are."""
    base_quantization: str | None
    """How the weights were quantized that the adapter was made for, or None."""


def lora_factors(name: str, layer: AdaptedLayer) -> Factors:
    """The layer ``name`` as LoRA of scale 1. ``s * delta`` is formed in float64 and rounded once to float32.

    Raises:
        PacaError: LoRA can't say the same of this kind of layer, or a value is not finite; the layer is named.
    """
    if not issubclass(layer.stock_class, (nn.Linear, Conv1D)):
        raise PacaError(
            f"{name} is a {layer.stock_class.__name__}, whose trained columns paca can't write as LoRA; it can for "
            "Linear and Conv1D. Export the merged model instead (--to merged)."
        )
    r = layer.indices.numel()
    a = torch.zeros(r, layer.in_features)
    a[torch.arange(r), layer.indices] = 1
    b = (layer.delta.double() * layer.scale).float()
    if not bool(b.isfinite().all()):
        raise PacaError(f"{name}: the delta holds NaN or Inf, or overflows float32. The adapter is broken.")
    return Factors(a, b)


def to_lora(adapter: Adapter) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter as LoRA: its config, and its tensors by the names they have in PEFT's files.

    Every layer's scale is 1, in the config's patterns where ranks differ too, so that a program that doesn't read
    those is right as well.

    Raises:
        PacaError: a layer that LoRA can't express, by name.
    """
    tensors = dict(adapter.saved_whole)
    ranks: dict[str, int] = {}
    for name, layer in adapter.layers.items():
        factors = lora_factors(name, layer)
        tensors[f"{FILE_PREFIX}{name}.{LORA_A}"], tensors[f"{FILE_PREFIX}{name}.{LORA_B}"] = factors
        ranks[name] = layer.indices.numel()
    r, rank_pattern = default_and_pattern(ranks)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=rank_pattern,
        alpha_pattern=dict(rank_pattern),
        target_modules=exact_targets(adapter.layers, adapter.module_names),
        fan_in_fan_out=any(issubclass(layer.stock_class, Conv1D) for layer in adapter.layers.values()),
        lora_dropout=0.0,
        bias="none",
        modules_to_save=adapter.config.modules_to_save,
        task_type=adapter.config.task_type,
        auto_mapping=adapter.config.auto_mapping,
        base_model_name_or_path=adapter.config.base_model_name_or_path,
        revision=adapter.config.revision,
        inference_mode=True,
    )
    return config, tensors


def save_as_lora(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Write a PaCA adapter that a model holds as a LoRA adapter, which PEFT loads without paca.

    Args:
        model: a ``PeftModel``; it is left as it is.
        folder: where to write; existing files of the same names are replaced.
        adapter_name: which of its adapters.

    Raises:
        ValueError: no such adapter, or a layer that LoRA can't express, by name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(adapter_in_model(model, adapter_name), folder, [])


def export_lora(
    path: str | Path, output: str | Path, *, base_model: str | None = None, overwrite: bool = False
) -> LoraExport:
    """Write a run's or a folder's PaCA adapter as a LoRA adapter, with its tokenizer if it has one.

    Reads the base model's config, not its weights. The folder appears only when it is complete.

    Args:
        path: a run folder or an adapter folder.
        output: the folder to write.
        base_model: where the base model lies, if not where the adapter says.
        overwrite: replace an adapter that ``output`` already holds.

    Raises:
        PacaError: an adapter that can't be read or that LoRA can't express, or an output that is in use.
    """
    source = adapter_in(path)
    output = lora_output(path, output, base_model, overwrite)
    adapter = read_adapter(path, base_model)
    with new_folder(output) as partial:
        _write(adapter, partial, tokenizer_files(source))
    ranks = sorted({layer.indices.numel() for layer in adapter.layers.values()})
    base = str(adapter.config.base_model_name_or_path)
    return LoraExport(
        output, base, len(adapter.layers), ranks, sorted(adapter.saved_whole), adapter.config.base_quantization
    )


def _write(adapter: Adapter, folder: Path, beside: Iterable[Path]) -> None:
    config, tensors = to_lora(adapter)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        {"format": "pt"},
    )
    # A set's order differs from process to process.
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in beside:
        shutil.copyfile(file, folder / file.name)
