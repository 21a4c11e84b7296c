"""A model as it was, whatever runs through it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from paca.layers.overlaid_weight import OverlaidWeight
from paca.quantized import quantization_of


@contextmanager
def left_as_it_was(model: nn.Module, *, freeze: bool) -> Iterator[None]:
    """Run ``model`` in evaluation mode, and put back its modes, what requires grad, and all random generators.

    Args:
        model: whose passes run inside.
        freeze: let none of its parameters require grad meanwhile.
    """
    training = [(module, module.training) for module in model.modules()]
    requiring = [p for p in model.parameters() if p.requires_grad] if freeze else []
    # In evaluation mode some quantized layers repack their weight, into a form without a backward pass.
    quantized = [(q, m) for m in model.modules() if not isinstance(m, OverlaidWeight) and (q := quantization_of(m))]
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            for quantization, module in quantized:
                quantization.adopt(module)
            model.eval()
            for parameter in requiring:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in requiring:
            parameter.requires_grad_(True)
        for quantization, module in quantized:
            quantization.release(module)
        for module, mode in training:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)
