"""Base models and adapters on the disk, for tests of conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import adapt


def save_adapted(folder: Path, base_model: nn.Module, **settings: Any) -> Any:
    """Save `base/` and `adapter/` and give back the adapted model; its deltas visibly move the outputs."""
    base_model.save_pretrained(folder / "base")
    torch.manual_seed(3)
    model = adapt(base_model, **{"task_type": "CAUSAL_LM", **settings}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "paca_delta" in name:
                parameter.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def change(delta: Tensor, indices: Tensor, scale: float, in_features: int) -> Tensor:
    """`scale * delta` in its columns of a weight, `(out_features, in_features)` float64."""
    dense = torch.zeros(delta.shape[0], in_features, dtype=torch.float64)
    for place, column in enumerate(indices.tolist()):
        dense[:, column] = scale * delta[:, place].double()
    return dense
