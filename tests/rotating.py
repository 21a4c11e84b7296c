"""Models whose columns were rotated, for tests."""

from __future__ import annotations

import torch

import paca
from paca.layers import paca_layers


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def named_layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, paca.layers.PacaLayer)}


def weights(model):
    return [layer.base_layer.weight.detach().clone() for layer in paca_layers(model)]


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(model, inputs, steps=1, optimizer=None, every=0, done=0, **rotation):
    """Steps on a loss that is not flat in any column; rotates at the beginning of a step, as the callback does."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=0.05)
    for step in range(done, done + steps):
        if every and step and step % every == 0:
            paca.rotate(model, optimizer, step // every, **rotation)
        outputs = model(inputs)
        getattr(outputs, "logits", outputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def rotated(model, inputs, rotations=3, **settings):
    """`model` with as many rotations as asked for, trained before and after each; the last forward is up to date."""
    train(model, inputs, steps=2 * rotations + 1, every=2, **settings)
    with torch.no_grad():
        model(inputs)
    return model
