"""Makes the tiny models of `tiny_architectures` and runs a training step of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from tiny_architectures import CONFIGS


def _tiny_model(architecture: str, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    config_name, model_name, options = CONFIGS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{"attn_implementation": "sdpa", **options, **overrides})
    model = getattr(transformers, model_name)(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            nn.init.normal_(parameter, mean=0.7, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """Makes a model: `(architecture, dtype, **config overrides)`, always with the same weights, in training mode."""
    return _tiny_model


def _run(model: nn.Module, batch: int = 3, length: int = 7) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward of one padded batch: logits, and gradients of the parameters and of the embeddings."""
    generator = torch.Generator().manual_seed(1)
    width = model.get_input_embeddings().weight.shape[1]
    dtype = model.get_input_embeddings().weight.dtype
    embeddings = torch.randn(batch, length, width, generator=generator).to(dtype).requires_grad_()
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0  # on the right: a row that sees nothing is NaN in the stock eager attention in float64
    model.zero_grad()
    logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {"embeddings": embeddings.grad, **gradients}


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Runs a step: `(model, batch, length)` -> logits and gradients by name."""
    return _run
