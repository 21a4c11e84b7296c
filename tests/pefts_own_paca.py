"""A stand-in for the PaCA of PEFT >= 0.22, which is on no package index: its settings, its loader and its forward.

Written from what its source says (peft.tuners.paca on PEFT's forge): settings that it does not know are dropped with a
warning, all layers have one r and one alpha, only linear layers are taken, and r may not exceed a layer's inputs.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.config import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."


@dataclass
class TheirConfig(PeftConfig):
    r: int = 8
    paca_alpha: int = 8
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    random_seed: int | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None


class TheirLinear(nn.Module):
    """One adapted layer."""

    def __init__(self, base_layer: nn.Linear, config: TheirConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = config.paca_alpha / config.r
        self.paca_delta = nn.Parameter(torch.zeros(base_layer.out_features, config.r))
        self.register_buffer("paca_indices", torch.randperm(base_layer.in_features)[: config.r].sort().values)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight.detach().clone()
        columns = torch.add(weight[:, self.paca_indices], self.paca_delta, alpha=self.scaling)
        weight[:, self.paca_indices] = columns.detach().to(weight.dtype)
        return F.linear(x, weight, self.base_layer.bias)


def read_config(folder: Path) -> TheirConfig:
    settings = json.loads((folder / "adapter_config.json").read_text())
    known = {field.name for field in fields(TheirConfig)}
    dropped = sorted(settings.keys() - known)
    if dropped:
        warnings.warn(f"Unexpected keyword arguments {dropped} for class PacaConfig, these are ignored.", stacklevel=2)
    return TheirConfig(**{name: value for name, value in settings.items() if name in known})


def load(base_model: nn.Module, folder: Path) -> nn.Module:
    """Put the adapter in `folder` into `base_model`, as `PeftModel.from_pretrained` does."""
    config, tensors = read_config(folder), load_file(folder / "adapter_model.safetensors")
    for name, module in list(base_model.named_modules()):
        if not check_target_module_exists(config, name):
            continue
        if not isinstance(module, nn.Linear):
            raise TypeError(f"Target module {module} is not supported.")
        if config.r > module.in_features:
            raise ValueError(f"`r` ({config.r}) cannot be larger than in_features ({module.in_features}).")
        parent, _, child = name.rpartition(".")
        setattr(base_model.get_submodule(parent), child, TheirLinear(module, config))
    found = base_model.load_state_dict({key.removeprefix(PREFIX): t for key, t in tensors.items()}, strict=False)
    missing = [key for key in found.missing_keys if ".paca_" in key]
    assert not missing, missing
    assert not found.unexpected_keys, found.unexpected_keys
    return base_model.eval()


def save(folder: Path, config: TheirConfig, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write an adapter as PEFT >= 0.22 does: its settings, and (delta, indices) of each layer."""
    folder.mkdir(parents=True)
    settings = {field.name: getattr(config, field.name) for field in fields(config)} | {"peft_type": "PACA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    tensors = {}
    for name, (delta, indices) in layers.items():
        tensors[f"{PREFIX}{name}.paca_delta"], tensors[f"{PREFIX}{name}.paca_indices"] = delta, indices
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
