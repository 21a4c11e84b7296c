"""The floor: nothing is trained, gradients only pass through."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from paca.bench.method import Adaptation, Method


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Let the first layer's output require grad, so that the backward pass goes through the whole model."""
    first = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else next(model.children())
    assert isinstance(first, nn.Module)
    first.register_forward_hook(_require_grad)
    return model


METHOD = Method("frozen", "the floor: all weights frozen, the first layer's output requires grad", prepare)
