"""A PaCA adapter as the LoRA adapter that it is.

`W0 x + s delta x[indices]` is `W0 x + B A x` with a matrix `A` that picks the inputs `indices` (one 1 in each row) and
`B = s delta`. So LoRA of rank r says the same, and whatever runs LoRA runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca.convert.adapter import AdaptedLayer, Adapter, adapter_in_model
from paca.convert.export_card import export_card
from paca.convert.target_names import exact_targets
from paca.convert.tensor_files import FILE_PREFIX, write_adapter
from paca.messages.errors import PacaError
from paca.tuner.rotation.union_config import default_and_pattern

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


def lora_factors(name: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """The layer `name` as LoRA of scale 1, in float32: A `(r, in_features)`, one 1 in each row; B `(out_features, r)`.

    Raises:
        PacaError: LoRA can't say the same of this kind of layer, or a value is not finite; the layer is named.
    """
    if not issubclass(layer.stock_class, (nn.Linear, Conv1D)):
        raise PacaError(
            f"{name} is a {layer.stock_class.__name__}, whose trained columns paca can't write as LoRA; it can for "
            "Linear and Conv1D. Export the merged model instead (--to merged)."
        )
    a = torch.zeros(layer.r, layer.in_features)
    a[torch.arange(layer.r), layer.indices] = 1
    return a, layer.scaled_delta(name)


def to_lora(adapter: Adapter) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter as LoRA: its config, and its tensors by the names they have in PEFT's files.

    Every layer's scale is 1, in the config's patterns where ranks differ too, so that a program that doesn't read
    those is right as well.

    Raises:
        PacaError: A layer that LoRA can't express, by name.
    """
    tensors = dict(adapter.saved_whole)
    for name, layer in adapter.layers.items():
        a, b = lora_factors(name, layer)
        tensors |= {f"{FILE_PREFIX}{name}.{LORA_A}": a, f"{FILE_PREFIX}{name}.{LORA_B}": b}
    r, rank_pattern = default_and_pattern({name: layer.r for name, layer in adapter.layers.items()})
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=rank_pattern,
        alpha_pattern=dict(rank_pattern),
        target_modules=exact_targets(adapter.layers, adapter.module_names),
        fan_in_fan_out=any(issubclass(layer.stock_class, Conv1D) for layer in adapter.layers.values()),
        lora_dropout=0.0,
        bias="none",
        **adapter.common_settings(),
    )
    return config, tensors


def save_as_lora(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Write a PaCA adapter of a `PeftModel` into `folder` as a LoRA adapter with a card; PEFT loads it without paca.

    Raises:
        ValueError: No such adapter, or a layer that LoRA can't express, by name.
    """
    write_lora(adapter_in_model(model, adapter_name), Path(folder))


def write_lora(adapter: Adapter, folder: Path) -> None:
    """Write the adapter as LoRA into `folder`, with a card (errors as of `to_lora`)."""
    config, tensors = to_lora(adapter)
    write_adapter(folder, config.to_dict(), tensors, adapter.config.base_quantization)
    (folder / "README.md").write_text(export_card(adapter, "lora"), encoding="utf-8")
