"""Batch norm under an adapter: it is as frozen as the weights, whose file alone a run leaves beside the base model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms work as in inference, whatever mode they are put into: by the base's running statistics.

    In training they would count the batches into these, and no adapter's file has them. Those in modules that are
    trained whole (`modules_to_save`) are saved, and stay as they are.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and ".modules_to_save." not in name:
            module.register_forward_pre_hook(_as_in_inference)


def _as_in_inference(module: nn.Module, _: Any) -> None:
    module.training = False
