"""Trains a tiny model, and looks at its weights after every step."""

from __future__ import annotations

import gc
import hashlib
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from models import adapt, llama, tokens
from paca.layers import paca_layers


@dataclass
class Endured:
    """What came of it."""

    hash: str = ""
    """Of all losses and of the deltas at the end."""
    tensor_bytes: list[int] = field(default_factory=list)
    """Of all live tensors, at moments spread evenly over the run."""
    process_bytes: list[int] = field(default_factory=list)
    """Resident memory of the process, then."""
    layers: int = 0


def train_and_look(steps: int, dtype: torch.dtype = torch.bfloat16, *, moments: int = 10) -> Endured:
    """Train with AdamW, the learning rate constant.

    Between steps: a pass with the adapter disabled (every 10 steps), and a state dict (every 25).

    Args:
        steps: How many.
        dtype: Of the weights.
        moments: How often memory is measured, which takes long in a process with many objects.

    Raises:
        AssertionError: After a step, a column is not `round(W0 + s * delta)`, or another one has changed.
    """
    base = llama().to(dtype)
    originals = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = adapt(base, r=4, paca_alpha=8, target_modules="all-linear", init_weights=True)
    layers = [(name, layer) for name, layer in model.get_base_model().named_modules() if layer in [*paca_layers(model)]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    digest, found = hashlib.sha256(), Endured(layers=len(layers))
    for step in range(1, steps + 1):
        ids = tokens(seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        digest.update(loss.detach().numpy().tobytes())
        for name, layer in layers:
            _check(layer, originals[f"{name}.weight"])
        if step % 10 == 0:
            with model.disable_adapter(), torch.no_grad():
                model(input_ids=ids)
        if step % 25 == 0:
            model.state_dict()
        if step % (steps // moments) == 0:
            _measure(found)
    for parameter in trained:
        digest.update(parameter.detach().numpy().tobytes())
    found.hash = digest.hexdigest()
    return found


def _check(layer: Any, original: torch.Tensor) -> None:
    columns, delta = layer.paca_indices["default"], layer.paca_delta["default"].detach()
    expected = original.clone()
    expected[:, columns] = (original[:, columns].float() + layer.scaling["default"] * delta).to(original.dtype)
    assert torch.equal(layer.base_layer.weight, expected)


def _measure(found: Endured) -> None:
    gc.collect()
    live = {id(thing): thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)}
    found.tensor_bytes.append(sum(tensor.nbytes for tensor in live.values()))
    found.process_bytes.append(psutil.Process().memory_info().rss)
