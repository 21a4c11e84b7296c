"""A PaCA adapter for PEFT's own PaCA (>= 0.22), which takes less than ours: what it can't load, and a form that it can.

Its config knows one `r` and one `paca_alpha` for all layers, and drops the settings that it does not know; it adapts
linear layers only, and none with fewer than `r` inputs (read in its source: it is on no package index yet).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.config import PeftConfig
from torch import Tensor, nn

from paca.columns.folded import ColumnUnion
from paca.config import PacaConfig
from paca.convert.adapter import AdaptedLayer, Adapter, stock_class
from paca.convert.export_card import export_card
from paca.convert.target_names import exact_targets
from paca.convert.tensor_files import column_tensors, write_adapter
from paca.layers import PacaLayer
from paca.messages.errors import PacaError

PEFT = "PEFT >= 0.22"
FIELDS = (
    *("r", "paca_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("random_seed", "init_weights", "modules_to_save"),
)
"""What its config knows, besides the fields of every PEFT config."""


class SavedLayer(NamedTuple):
    """What the file of an adapter says of a layer."""

    name: str
    r: int
    scale: float
    stock_class: type[nn.Module]


def saved_layers(model: nn.Module, adapter_name: str = "default") -> list[SavedLayer]:
    """The layers of an adapter as its file has them: a rotated one has all the columns that it ever trained."""
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, PacaLayer) and adapter_name in layer.paca_delta:
            folded, r = layer.folded.get(adapter_name), layer.r[adapter_name]
            columns = r if folded is None else r + folded.indices.numel()
            scale = layer.paca_alpha[adapter_name] / r
            layers.append(SavedLayer(name.removeprefix("base_model.model."), columns, scale, stock_class(layer)))
    return layers


def why_not(settings: Mapping[str, Any], layers: Iterable[SavedLayer]) -> str | None:
    """Why PEFT's own PaCA can't load an adapter with this config as it is, or None if it can."""
    r, paca_alpha = settings["r"], settings["paca_alpha"]
    if settings.get("trainable_token_indices"):
        return "it trains single tokens (trainable_token_indices), which that does not know"
    for layer in layers:
        if not issubclass(layer.stock_class, nn.Linear):
            return f"{layer.name} is a {layer.stock_class.__name__}, and it adapts Linear layers only"
        if layer.r != r:
            return f"{layer.name} has {layer.r} columns, and it gives all layers r={r}"
        if layer.scale != paca_alpha / r:
            return f"{layer.name} has the scale {layer.scale:g}, and it gives all layers {paca_alpha / r:g}"
    return None


def to_pefts_paca(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter as PEFT's own PaCA takes it: the content of its config, and its tensors by their names in the file.

    Each layer's scale is multiplied into its deltas, so that one of 1 is right for all. Layers with fewer columns than
    others get further ones, whose deltas are zero. The outputs are the same: bit for bit where each scale is a power of
    two, else to the rounding of `scale * delta` to float32.

    Raises:
        PacaError: Single tokens or a layer that PEFT's own PaCA can't adapt, or a value that is not finite.
    """
    if adapter.config.trainable_token_indices:
        raise PacaError(
            f"The adapter trains single tokens (trainable_token_indices), which the PaCA of {PEFT} does not know. Load "
            "the adapter with paca, or export another form of it (--to lora, --to merged)."
        )
    r = max(layer.r for layer in adapter.layers.values())
    columns: dict[str, ColumnUnion] = {}
    for name, layer in adapter.layers.items():
        if not issubclass(layer.stock_class, nn.Linear):
            raise PacaError(
                f"{name} is a {layer.stock_class.__name__}, which {PEFT} can't adapt: its PaCA takes Linear layers "
                "alone. Load the adapter with paca, or export another form of it (--to lora, --to merged)."
            )
        if layer.in_features < r:
            raise PacaError(
                f"{name} has {layer.in_features} input columns, but another layer trains {r}, and {PEFT} gives all "
                "layers one r. Load the adapter with paca, or export another form of it (--to lora, --to merged)."
            )
        columns[name] = _padded(name, layer, r)
    config = PacaConfig(
        r=r,
        paca_alpha=r,
        target_modules=exact_targets(adapter.layers, adapter.module_names),
        random_seed=None,
        **adapter.common_settings(),
    )
    known = {*FIELDS, *(field.name for field in dataclasses.fields(PeftConfig))}
    settings = {name: value for name, value in config.to_dict().items() if name in known}
    if adapter.quantization is not None:  # PEFT drops it with a warning; paca warns of other weights
        settings["base_quantization"] = adapter.quantization
    return settings, adapter.saved_whole | column_tensors(columns)


def _padded(name: str, layer: AdaptedLayer, r: int) -> ColumnUnion:
    """The columns of `layer` with its scale in the deltas, and the first others, with deltas of zero, up to `r`."""
    unused = torch.ones(layer.in_features, dtype=torch.bool)
    unused[layer.indices] = False
    indices, order = torch.cat([layer.indices, unused.nonzero().flatten()[: r - layer.r]]).sort()
    delta = layer.scaled_delta(name)
    return ColumnUnion(indices, torch.cat([delta, delta.new_zeros(len(delta), r - layer.r)], 1)[:, order])


def write_pefts_paca(adapter: Adapter, folder: Path) -> None:
    """Write the adapter for PEFT's own PaCA into `folder`, with a card (errors as of `to_pefts_paca`)."""
    write_adapter(folder, *to_pefts_paca(adapter))
    (folder / "README.md").write_text(export_card(adapter, "peft"), encoding="utf-8")
